"""Losses on layers and experts, and rollouts, in two processes: sharded weights train as copied ones do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_edge.storage.tensor_files import load_weights_file
from tests.distillation import parallel_terms_run


def read(folder: Path, parameter: str) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The log of the steps and the weights; the parameters in training were of the type `parameter`."""
    log = json.loads((folder / "log.json").read_text())
    assert log["parameter"] == parameter
    return log["steps"], load_weights_file(folder / "model" / "model.safetensors")


@pytest.mark.slow
def test_sharded_weights_train_as_copied_ones(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [parallel_terms_run.__file__, str(tmp_path), "ddp", "fsdp"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    copied_log, copied = read(tmp_path / "ddp", "Parameter")
    sharded_log, sharded = read(tmp_path / "fsdp", "DTensor")
    assert len(copied_log) == len(sharded_log) == parallel_terms_run.STEPS
    for ours, theirs in zip(sharded_log, copied_log, strict=True):
        assert ours["rollout_tokens"] == theirs["rollout_tokens"] > 0
        for name in ("total_loss", "grad_norm", *(f"{term}_loss" for term in parallel_terms_run.TABLE)):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert sharded.keys() == copied.keys()
    for name, tensor in copied.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-4, atol=1e-5)
