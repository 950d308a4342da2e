"""plan.uneven from the command line: one build up to its files, and a family that is refused before any work."""

import json

import pytest

from moe_edge.contracts.plan import Plan
from tests.exporting.gguf_models import REPRESENTABLE
from tests.tiny import tiny_checkpoint
from tests.uneven_models import skewed_teacher

SETTINGS = [
    "plan.uneven=true", "plan.experts=4", "plan.criterion=frequency", "calibration.tokens=1024",
    "calibration.sequence_length=64", "profile.cka_tokens=0", "plan.tokens=256", "distill.tokens=256",
    "target.context_length=64", "export.gguf.types=[Q8_0]", "target.runtime.threads=1",
]  # fmt: skip


@pytest.fixture
def build(called, monkeypatch, tmp_path):
    """`moe-edge build TEACHER --until export` in this process: exit code and stderr."""
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))
    settings = [word for setting in SETTINGS for word in ("--set", setting)]

    def run(teacher):
        out = ("--out", tmp_path / "run")
        code, _, stderr = called("build", teacher, "--target", "cpu", *out, "--until", "export", *settings)
        return code, stderr

    return run


def test_a_build_with_uneven_layers_ends_with_files_that_equal_the_student(build, tmp_path):
    teacher = skewed_teacher(tmp_path, "gpt_oss", **REPRESENTABLE["gpt_oss"])
    code, stderr = build(teacher)
    assert code == 0, stderr[-4000:]
    plan = Plan.read(tmp_path / "run/plan/plan.json")
    config = json.loads((tmp_path / "run/distill/model/config.json").read_text())
    assert plan.uneven and config["num_local_experts"] == plan.places > 4
    assert config["moe_edge_experts_per_layer"] == [len(ids) for ids in plan.kept.values()]
    rows = json.loads((tmp_path / "run/export/parity.json").read_text())
    assert {"gguf F16", "onnx fp32", "gguf F16 against onnx fp32"} <= {row["artifact"] for row in rows}
    assert all(row["passed"] for row in rows if row["artifact"] in ("gguf F16", "onnx fp32"))


def test_a_family_without_a_bias_is_refused_before_the_profile(build, tmp_path):
    code, stderr = build(tiny_checkpoint(tmp_path, "mixtral"))
    assert code == 4 and "plan.uneven=false" in stderr and "no bias of its router" in stderr
    assert not (tmp_path / "run" / "profile").exists()
