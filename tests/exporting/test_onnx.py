"""ONNX folders of every exported family: exact in float32, close in four bits, run by onnxruntime-genai, same bytes twice."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig

from moe_edge.contracts.errors import ConfigError, EnvironmentProblem, InputRejected
from moe_edge.contracts.onnx_bits import PRECISIONS, fitting_block
from moe_edge.exporting import onnx_graph
from moe_edge.exporting.onnx import export_onnx
from moe_edge.models.loading import load_model
from moe_edge.runtimes.base import generate
from moe_edge.runtimes.hf import HfRuntime
from moe_edge.runtimes.ort import OrtRuntime
from moe_edge.storage.files import sha256_file
from tests.exporting.onnx_models import (
    CASES,
    MAX_DIFFERENCE,
    PROMPT,
    case,
    genai_greedy,
    hf_logits,
    initializers,
    kl_nats,
    ort_logits,
    spec_of,
    with_stored_weights,
)
from tests.tiny import tiny_checkpoint


@pytest.mark.parametrize("family", CASES)
def test_float32_is_exact_and_decodes_the_same_tokens(family: str, tmp_path: Path) -> None:
    checkpoint = case(tmp_path, family, tied=family in ("olmoe", "ernie4_5_moe"))
    summary = export_onnx(checkpoint, tmp_path / "onnx", precision="fp32")
    assert np.abs(ort_logits(tmp_path / "onnx") - hf_logits(checkpoint)).max() <= MAX_DIFFERENCE
    assert summary["nodes"]["MoE"] == len(spec_of(checkpoint).moe_layers) and "QMoE" not in summary["nodes"]

    with HfRuntime(checkpoint, 1, 256) as hf, OrtRuntime(tmp_path / "onnx", 1, 256) as ort:
        expected = generate(hf, PROMPT, 16)
        assert generate(ort, PROMPT, 16) == expected
    answer = genai_greedy(tmp_path / "onnx", 16)
    assert answer == expected[: len(answer)] and answer


@pytest.mark.parametrize("family", CASES)
def test_every_quantized_precision_is_close(family: str, tmp_path: Path) -> None:
    checkpoint = case(tmp_path, family)
    reference = hf_logits(checkpoint)
    sizes = {}
    for precision, bound in {"fp16": 1e-4, "int8": 0.01, "int4": 0.02}.items():
        summary = export_onnx(checkpoint, tmp_path / precision, precision=precision)
        assert kl_nats(reference, ort_logits(tmp_path / precision)) <= bound, precision
        with OrtRuntime(tmp_path / precision, 1, 256) as ort:
            answer = genai_greedy(tmp_path / precision, 8)
            assert answer and answer == generate(ort, PROMPT, 8)[: len(answer)], precision
        sizes[precision] = summary["bytes"]
        classes = set(summary["bits"]) - {"router"}
        assert {name: summary["bits"][name] for name in classes} == {n: [PRECISIONS[precision][n]] for n in classes}
    assert sizes["fp16"] > sizes["int8"] > sizes["int4"]


@pytest.mark.parametrize("family", CASES)
def test_every_weight_matrix_of_the_int4_graph_is_quantized(family: str, tmp_path: Path) -> None:
    checkpoint = case(tmp_path, family)
    export_onnx(checkpoint, tmp_path / "onnx", precision="int4")
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    nodes = Counter(node.op_type for node in model.graph.node)
    spec = spec_of(checkpoint)
    assert nodes["QMoE"] == len(spec.moe_layers) and nodes["MoE"] == 0 and nodes["GatherBlockQuantized"] == 1
    floats = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    assert all("router" in name or "shared_expert_gate" in name for name in floats)
    mlps = len(spec.dense_layers) + (len(spec.moe_layers) if spec.moe.shared_width else 0)
    assert nodes["MatMulNBits"] == 2 * spec.layers + 3 * mlps + 1  # qkv and o; gate, up and down; head
    for node in model.graph.node:
        if node.op_type in ("QMoE", "MatMulNBits"):
            assert {a.name: a.i for a in node.attribute}["accuracy_level"] == 4
        if node.op_type == "QMoE":
            assert node.input[11] and node.input[12]
            own = spec.moe.renormalise and spec.moe.gating != "sigmoid" and not spec.moe.selection_bias
            assert bool(len(node.input) > 14 and node.input[14]) is not own
            assert bool(node.input[4]) is bool(node.input[7]) is spec.moe.expert_biases
    wide = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1]
    small = ("router", "shared_expert_gate", "_cache", ".bias", "conv.conv")
    assert not [t.name for t in wide if not any(part in t.name for part in small)]


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_quantized_operators_compute_what_is_stored(family: str, tmp_path: Path) -> None:
    """With float32 activations the int4 graph equals the dequantized model: layout and routing are exact."""
    checkpoint = case(tmp_path, family)
    export_onnx(checkpoint, tmp_path / "onnx", precision="int4", accuracy_level=0)
    model = with_stored_weights(load_model(checkpoint), initializers(tmp_path / "onnx"))
    expected = model(torch.from_numpy(PROMPT)[None]).logits[0].numpy()
    assert np.abs(ort_logits(tmp_path / "onnx") - expected).max() <= MAX_DIFFERENCE


@pytest.mark.parametrize("family", CASES)
def test_optimum_finds_the_names_that_it_looks_for(family: str, tmp_path: Path) -> None:
    """ORTModelForCausalLM: config.json beside one model.onnx; caches by name and number; logits over the vocabulary."""
    checkpoint, folder = case(tmp_path, family), tmp_path / "onnx"
    export_onnx(checkpoint, folder, precision="int4")
    spec, graph = spec_of(checkpoint), onnx.load(folder / "model.onnx", load_external_data=False).graph
    attention = [layer for layer in range(spec.layers) if spec.kind_of(layer) != "conv"]
    caches = {f"{layer}.{side}" for layer in attention for side in ("key", "value")}
    states = {f"{layer}.conv" for layer in set(range(spec.layers)) - set(attention)}
    assert {value.name for value in graph.input} == {
        "input_ids",
        "attention_mask",
        *(f"past_key_values.{name}" for name in caches),
        *(f"past.{n}" for n in states),
    }
    assert {value.name for value in graph.output} == {"logits", *(f"present.{name}" for name in caches | states)}
    assert [path.name for path in folder.glob("*.onnx")] == ["model.onnx"]
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    assert (config.model_type, config.vocab_size) == (spec.family, spec.vocab)
    shapes = {
        value.name: [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim] for value in graph.output
    }
    assert shapes["logits"] == ["batch_size", "sequence_length", spec.vocab]
    past = next(value for value in graph.input if value.name.startswith("past_key_values."))
    assert past.type.tensor_type.shape.dim[1].dim_value == spec.kv_heads


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_a_tied_head_is_stored_once(precision: str, tmp_path: Path) -> None:
    sizes = {}
    for tied in (True, False):
        checkpoint = tiny_checkpoint(tmp_path, "qwen3_moe", tied=tied, name=f"model-{tied}")
        sizes[tied] = export_onnx(checkpoint, tmp_path / f"onnx-{tied}", precision=precision)["bytes"]
        assert kl_nats(hf_logits(checkpoint), ort_logits(tmp_path / f"onnx-{tied}")) < 0.02
    table = 300 * 64 * {"fp16": 2, "int4": 1}[precision]
    assert sizes[False] - sizes[True] > 0.9 * table


def test_the_same_input_gives_the_same_bytes_and_nothing_else(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "qwen2_moe", dtype=torch.bfloat16)
    digests = []
    for name in ("a", "b"):
        export_onnx(checkpoint, tmp_path / name, precision="int4")
        digests.append({path.name: sha256_file(path) for path in sorted((tmp_path / name).iterdir())})
    assert digests[0] == digests[1]
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "config.json"} <= digests[0].keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", checkpoint.name]
    assert str(tmp_path).encode() not in (tmp_path / "a" / "model.onnx").read_bytes()
    assert str(tmp_path) not in (tmp_path / "a" / "genai_config.json").read_text()


def test_an_old_folder_is_replaced_and_stdout_stays_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "mixtral", name="model")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "stale").touch()
    summary = export_onnx(checkpoint, tmp_path / "onnx", precision="int8")
    assert not (tmp_path / "onnx" / "stale").exists() and capsys.readouterr().out == ""
    assert json.loads(json.dumps(summary)) == summary


def test_importance_of_kept_experts_changes_only_the_experts(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "qwen3_moe", experts=4)
    generator = torch.Generator().manual_seed(1)
    imatrix = {
        "expert_in": torch.rand(2, 6, 64, generator=generator) ** 4 * 100,
        "expert_down": torch.rand(2, 6, 32, generator=generator) ** 4 * 100,
        "expert_count": torch.full((2, 6), 100),
    }
    export_onnx(checkpoint, tmp_path / "plain", precision="int4")
    export_onnx(
        checkpoint, tmp_path / "ours", precision="int4", imatrix=imatrix, kept={0: [0, 1, 2, 3], 1: [0, 2, 4, 5]}
    )
    plain, ours = initializers(tmp_path / "plain"), initializers(tmp_path / "ours")
    changed = {name for name in plain if not np.array_equal(plain[name], ours[name])}
    assert changed and all(".moe." in name for name in changed)


def test_a_sliding_window_reaches_the_attention(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "mixtral", sliding_window=5)
    export_onnx(checkpoint, tmp_path / "onnx", precision="fp32")
    assert np.abs(ort_logits(tmp_path / "onnx") - hf_logits(checkpoint)).max() <= MAX_DIFFERENCE


def test_errors_name_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "mixtral")
    with pytest.raises(ConfigError, match="int3"):
        export_onnx(checkpoint, tmp_path / "onnx", precision="int3")
    assert fitting_block(128, 576, 64) == 64 and fitting_block(64, 48) == 16
    with pytest.raises(ConfigError, match="precision=fp32"):
        fitting_block(64, 40)
    with pytest.raises(InputRejected):
        export_onnx(
            tiny_checkpoint(tmp_path, "mixtral", with_tokenizer=False, name="mute"), tmp_path / "x", precision="fp32"
        )
    monkeypatch.setattr(onnx_graph, "BUILDER_VERSION", "0.1")
    with pytest.raises(EnvironmentProblem, match="onnxruntime-genai"):
        export_onnx(checkpoint, tmp_path / "onnx", precision="fp32")
    assert not (tmp_path / "onnx").exists()


def test_of_several_chat_templates_genai_gets_the_default_and_of_several_ends_all(tmp_path: Path) -> None:
    import onnxruntime_genai as og

    checkpoint = case(tmp_path, "mixtral")
    (checkpoint / "chat_template.jinja").unlink()
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    own = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(own | {"eos_token_id": 2}))
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [20, 21]}')
    export_onnx(checkpoint, tmp_path / "onnx", precision="int8")
    assert {2, 20, 21} == set(
        json.loads((tmp_path / "onnx" / "genai_config.json").read_text())["model"]["eos_token_id"]
    )
    assert og.Tokenizer(str(tmp_path / "onnx")).apply_chat_template('[{"role": "user", "content": "hi"}]') == "D"
