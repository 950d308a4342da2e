"""A plan's own types per class reach the quantizer, for the main file only, and are in its name."""

import pytest

from moe_edge.export import gguf_files as gguf_stage
from moe_edge.stages import export as stage
from tests.planning.plan_helpers import config
from tests.tiny import tiny_checkpoint

MIX = {"expert_down@0-0": "Q2_K", "attention": "Q8_0"}


@pytest.fixture
def quantized(monkeypatch):
    """What would be quantized: recipe -> mix."""
    calls = {}

    def quantize(_src, dst, recipe, _imatrix, _threads, mix):
        calls[recipe] = mix
        dst.write_bytes(b"x")

    monkeypatch.setattr(gguf_stage, "write_gguf", lambda _model, path, **_kw: path.write_bytes(b"x"))
    monkeypatch.setattr(gguf_stage, "quantize_gguf", quantize)
    monkeypatch.setattr(gguf_stage, "audit", lambda *_: {})
    return calls


def export(tmp_path, mix):
    model = tiny_checkpoint(tmp_path, "qwen3_moe")
    job = stage.plan_job(
        config(), model, tmp_path / "out", main="Q3_K_M", precision="int4", statistics=None, kept=None, provenance={},
        mix=mix,
    )  # fmt: skip
    artifacts, reopened = [], []
    gguf_stage.export_gguf(job, artifacts, reopened)
    return artifacts, [export.kind for export in reopened]


def test_the_main_file_has_the_mix_and_says_so(tmp_path, quantized):
    artifacts, reopened = export(tmp_path, MIX)
    assert quantized["Q3_K_M"] == MIX and quantized["Q8_0"] == {} == quantized["Q4_K_M"]
    assert artifacts[0]["quantization"] == "Q3_K_M-mix" and artifacts[0]["path"].endswith("-Q3_K_M-mix.gguf")
    assert "gguf Q3_K_M-mix delivered" in reopened and "gguf Q8_0 delivered" in reopened


def test_without_a_mix_names_are_the_recipes(tmp_path, quantized):
    artifacts, _ = export(tmp_path, None)
    assert [row["quantization"] for row in artifacts] == ["Q3_K_M", "Q4_K_M", "Q8_0"] and quantized["Q3_K_M"] == {}
