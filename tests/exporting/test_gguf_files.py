"""The GGUF half: a plan's own types per class reach the quantizer, for the main file only, and are in its name; the rows."""

import pytest

from moe_edge.contracts.artifacts import ExportedArtifact, ExportSummary
from moe_edge.exporting import gguf_files
from moe_edge.exporting.gguf_audit import StoredSizes
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

    monkeypatch.setattr(gguf_files, "write_gguf", lambda _model, path, **_kw: path.write_bytes(b"x"))
    monkeypatch.setattr(gguf_files, "quantize_gguf", quantize)
    monkeypatch.setattr(gguf_files, "audit", lambda *_: StoredSizes({}, {}, {}))
    return calls


def export(tmp_path, mix):
    model = tiny_checkpoint(tmp_path, "qwen3_moe")
    job = stage.plan_job(
        config(),
        model,
        tmp_path / "out",
        main="Q3_K_M",
        precision="int4",
        statistics=None,
        kept=None,
        provenance={},
        mix=mix,
    )
    written = gguf_files.export_gguf_files(job)
    return written.artifacts, [file.kind for file in written.files]


def test_the_main_file_has_the_mix_and_says_so(tmp_path, quantized):
    artifacts, kinds = export(tmp_path, MIX)
    assert quantized["Q3_K_M"] == MIX and quantized["Q8_0"] == {} == quantized["Q4_K_M"]
    assert artifacts[0].quantization == "Q3_K_M-mix" and artifacts[0].path.endswith("-Q3_K_M-mix.gguf")
    assert "gguf Q3_K_M-mix delivered" in kinds and "gguf Q8_0 delivered" in kinds


def test_without_a_mix_names_are_the_recipes(tmp_path, quantized):
    artifacts, _ = export(tmp_path, None)
    assert [artifact.quantization for artifact in artifacts] == ["Q3_K_M", "Q4_K_M", "Q8_0"] and quantized[
        "Q3_K_M"
    ] == {}


def test_a_dumped_artifact_has_no_key_for_what_its_format_lacks():
    known = {
        "path": "artifacts/onnx",
        "quantization": "int4",
        "bytes": 10,
        "bits_per_weight": 4.0,
        "bytes_by_class": {"expert": 10},
        "bits_per_weight_by_class": {"expert": 4.0},
    }
    onnx = {"format": "onnx", "runtime": "ort"} | known
    assert ExportedArtifact(**onnx).model_dump(mode="json") == onnx
    gguf = {"format": "gguf", "runtime": "llama_cpp"} | known | {"files": ["artifacts/onnx"], "fallbacks": {}}
    summary = ExportSummary(name="m", artifacts=[ExportedArtifact(**gguf)], parity=[], imatrix=False)
    assert summary.model_dump(mode="json")["artifacts"] == [gguf]
