"""Test environment: one thread, no network, and a cache folder that vanishes with the session."""

import os
import signal
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
_CACHE = tempfile.TemporaryDirectory(prefix="moe-edge-tests-")
os.environ["MOE_EDGE_CACHE"] = _CACHE.name

import pytest  # noqa: E402
import torch  # noqa: E402

from moe_edge.cli import main as cli  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no worker ends up alone with them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state and thread count, whatever ran before it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def called(monkeypatch, capsys):
    """Run the CLI in this process: faster, for what needs no second process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["moe-edge", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        text = capsys.readouterr()
        return stop.value.code, text.out, text.err

    handler = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, handler)
