"""`moe-edge export` as a user runs it: a pre-tokenizer by name, every type that wants an importance matrix, a graph for CUDA."""

import json

import pytest
from tokenizers import Regex, pre_tokenizers

from moe_edge.contracts.quantization import NEEDS_IMATRIX, RECIPES
from moe_edge.exporting import gguf_pretokenizers as known
from moe_edge.runtimes.gguf_header import check_gguf_header
from tests.exporting.test_gguf_tokenizer import byte_level
from tests.tiny import tiny_checkpoint

SMALL = ("target.context_length=64", "target.runtime.threads=1")
IMPORTANCE_MATTERS = [name for name in RECIPES if name.startswith("IQ") or name == "MXFP4"]
PARTS = {"ffn_gate_exps": "expert_gate", "ffn_up_exps": "expert_up", "ffn_down_exps": "expert_down"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))


def settings(*pairs: str) -> list[str]:
    return [word for pair in (*SMALL, *pairs) for word in ("--set", pair)]


def test_a_pre_tokenizer_that_is_not_recognised_can_be_named(called, tmp_path):
    """Written differently, it splits as qwen2's does: refused unless the user says so, and then proved."""
    model, out = tiny_checkpoint(tmp_path, "mixtral", layers=1, vocab=420), tmp_path / "o"
    for file in (*model.glob("*token*"), model / "chat_template.jinja"):
        file.unlink()
    byte_level([pre_tokenizers.Split(Regex(f"{known.QWEN2}|(?!)"), "isolated")]).save_pretrained(model)
    only = settings("export.formats=[gguf]", "export.gguf.types=[Q8_0]")
    code, _, err = called("export", model, "--out", out, *only)
    assert code == 4 and "--set export.gguf.pre_tokenizer=" in err
    named = ("--set", "export.gguf.pre_tokenizer=qwen2")
    code, _, err = called("export", model, "--target", "mobile", "--out", out, *only, *named)
    assert code == 0, err
    assert "adb shell" in (out / "artifacts/bundle/gguf/README.md").read_text(), "a phone's bundle"
    assert "-t 1 " in (out / "artifacts/bundle/gguf/run.sh").read_text()
    (file,) = (out / "artifacts" / "gguf").iterdir()
    assert check_gguf_header(file).metadata["tokenizer.ggml.pre"] == "qwen2"
    code, _, err = called(
        "export", model, "--out", tmp_path / "x", *only, "--set", "export.gguf.pre_tokenizer=nonsense"
    )
    assert code == 4 and "unknown pre-tokenizer" in err


def test_llama_cpp_takes_our_importance_for_every_type_that_uses_it(called, tmp_path):
    """Profile, then export: the codebooks below three bits cannot be written without an importance matrix at all."""
    model = tiny_checkpoint(tmp_path, "qwen3_moe", experts=2, top_k=1, layers=1, hidden=256, width=256, head_dim=64)
    words = settings("calibration.tokens=512", "calibration.sequence_length=64", "profile.cka_tokens=0")
    code, _, err = called("profile", model, "--out", tmp_path / "profiled", *words)
    assert code == 0, err
    types = f"export.gguf.types=[{', '.join(IMPORTANCE_MATTERS)}]"
    code, out, err = called(
        "export", model, "--out", tmp_path / "o", "--json", *settings("export.formats=[gguf]", types)
    )
    assert code == 0, err
    told = json.loads(out)
    assert told["imatrix"] and [row["quantization"] for row in told["artifacts"]] == IMPORTANCE_MATTERS
    written = set()
    for row in told["artifacts"]:
        assert row["fallbacks"] == {}
        for name, tensor in check_gguf_header(tmp_path / "o" / row["path"]).tensors.items():
            if part := PARTS.get(name.removeprefix("blk.0.").removesuffix(".weight")):
                assert tensor.kind == RECIPES[row["quantization"]][part], name
                written.add(tensor.kind)
    assert written >= NEEDS_IMATRIX | {"MXFP4", "IQ4_NL", "IQ4_XS", "IQ3_S"}


def test_verify_takes_the_graph_for_cuda_and_each_bundle_holds_one_graph(called, tmp_path):
    """In the folder, in its own experimental bundle and in the tar; the CPU's bundle goes without it."""
    model, out = tiny_checkpoint(tmp_path, "qwen3_moe"), tmp_path / "o"
    settings = (
        "export.formats=[onnx]",
        "export.onnx.provider=cuda",
        "target.context_length=64",
        "target.runtime.threads=1",
    )
    code, _, err = called("export", model, "--out", out, *(word for setting in settings for word in ("--set", setting)))
    assert code == 0, err
    bundles = out / "artifacts" / "bundle"
    for path in (out, *(bundles / name for name in ("onnx", "onnx.tar", "onnx-cuda", "onnx-cuda.tar"))):
        code, _, err = called("verify", path)
        assert code == 0, err
    graphs = sorted(path.relative_to(bundles).as_posix() for path in bundles.rglob("model.onnx"))
    assert graphs == ["onnx-cuda/model/model.onnx", "onnx/model/model.onnx"]
    cpu, cuda = (json.loads((bundles / name / "model/genai_config.json").read_text()) for name in ("onnx", "onnx-cuda"))
    assert "cuda" in json.dumps(cuda) and "cuda" not in json.dumps(cpu)
    readme = (bundles / "onnx-cuda" / "README.md").read_text()
    assert "EXPERIMENTAL" in readme and "onnxruntime-genai-cuda" in readme
    assert "EXPERIMENTAL" not in (bundles / "onnx" / "README.md").read_text()
