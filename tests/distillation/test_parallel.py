"""Two processes, with copied and with sharded weights, train as one does: the same losses, step for step, and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_edge.storage.tensor_files import load_weights_file
from tests.distillation import parallel_run
from tests.distillation.parts import rows, tiny_teacher, write_cache

LOGGED = ("total_loss", "ce_loss", "kl_loss", "grad_norm", "learning_rate")


def run(folder: Path, processes: int, backend: str) -> tuple[dict, dict[str, torch.Tensor]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [parallel_run.__file__, str(folder), backend]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    out = folder / f"{backend}-{processes}"
    return json.loads((out / "log.json").read_text()), load_weights_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("parallel")
    write_cache(folder / "logits.h5", tiny_teacher(), rows())
    return folder, *run(folder, 1, "ddp")


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "parameter"), [("ddp", "Parameter"), ("fsdp", "DTensor")])
def test_two_processes_train_as_one(
    single: tuple[Path, dict, dict[str, torch.Tensor]], backend: str, parameter: str
) -> None:
    folder, alone, weights = single
    log, others = run(folder, 2, backend)
    assert log["parameter"] == parameter
    assert len(log["losses"]) == len(alone["losses"]) == 6
    for ours, theirs in zip(log["losses"], alone["losses"], strict=True):
        assert [ours[name] for name in LOGGED] == pytest.approx([theirs[name] for name in LOGGED], rel=1e-4)
    assert others.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-5)
