"""Test environment: one thread, no network, and a cache folder that vanishes with the session."""

import os
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

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state and thread count, whatever ran before it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
