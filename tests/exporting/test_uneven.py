"""Padded students in both formats: a GGUF holds the padding and computes the same, an ONNX graph holds real experts only."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_edge.compression.importance import student_imatrix
from moe_edge.contracts.capabilities import CAPABILITIES, PADDING
from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.quantization import RECIPES
from moe_edge.exporting.gguf import write_gguf
from moe_edge.exporting.gguf_audit import audit
from moe_edge.exporting.gguf_quantize import quantize_gguf
from moe_edge.exporting.imatrix import imatrix_arrays
from moe_edge.exporting.onnx import export_onnx
from moe_edge.models.loading import load_model
from moe_edge.models.pruning import without_padding
from moe_edge.profiling.sums import to_statistics
from moe_edge.runtimes.llama_cpp import LlamaCppRuntime
from tests.exporting.gguf_models import REPRESENTABLE, reference_logits, some_ids
from tests.exporting.onnx_models import (
    CASES,
    MAX_DIFFERENCE,
    PROMPT,
    hf_logits,
    initializers,
    ort_logits,
    spec_of,
    with_stored_weights,
)
from tests.profiling.runs import whole_pass
from tests.uneven_models import PADDABLE, uneven_student

EPSILON = {"deepseek_v3": 2e-4, "glm4_moe_lite": 2e-4}  # as in test_gguf.py
ONNX = sorted(family for family in PADDABLE if ("ort", family) in CAPABILITIES)


def students_imatrix(tmp_path: Path, family: str, kept: dict[int, list[int]]) -> dict[str, torch.Tensor]:
    """Of the padded student, from a pass of its teacher."""
    sums = to_statistics(whole_pass(tmp_path / f"tiny-{family}", tmp_path / "partial"), {}).imatrix
    imatrix, rest = student_imatrix(sums, kept, tmp_path, spec_of(tmp_path / "student"))
    assert rest is None
    return imatrix


@pytest.mark.parametrize("family", PADDABLE)
def test_llama_cpp_computes_what_transformers_does(tmp_path, family):
    student, _ = uneven_student(tmp_path, family, **REPRESENTABLE[family])
    weights = {name: tensor.half().float() for name, tensor in load_file(student / "model.safetensors").items()}
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    write_gguf(student, tmp_path / "F16.gguf", name="tiny")
    quantize_gguf(tmp_path / "F16.gguf", tmp_path / "F32.gguf", "F32", None, 1)
    with LlamaCppRuntime(tmp_path / "F32.gguf", threads=1, context_length=128, kv_float32=True) as runtime:
        difference = np.abs(runtime.logits(some_ids(96)) - reference_logits(student, some_ids(96))).max()
    assert difference <= EPSILON.get(family, 2e-5)


def test_the_imatrix_knows_that_padding_saw_no_token(tmp_path):
    student, kept = uneven_student(tmp_path, "deepseek_v3")
    imatrix = students_imatrix(tmp_path, "deepseek_v3", kept)
    teacher = to_statistics(whole_pass(tmp_path / "tiny-deepseek_v3", tmp_path / "again"), {}).imatrix
    assert imatrix["expert_count"].shape == (2, 6)
    assert imatrix["expert_count"][1][[2, 5]].tolist() == [0, 0] and not imatrix["expert_down"][1][[2, 5]].any()
    assert torch.equal(imatrix["expert_in"][1][[0, 1, 3, 4]], teacher["expert_in"][1][kept[2]])
    arrays = imatrix_arrays(imatrix, spec_of(student))
    found = arrays["blk.2.ffn_down_exps.weight"].reshape(6, -1)
    assert np.isfinite(found).all() and (found > 0).all()


SORTS = ("Q8_0", "Q4_K_M", "Q2_K", "IQ3_XXS", "IQ4_NL")  # of blocks; each recipe by itself is in test_gguf_quantize


@pytest.mark.parametrize("recipe", SORTS)
def test_every_sort_of_recipe_takes_zero_experts(tmp_path, recipe):
    student, kept = uneven_student(tmp_path, "minimax_m2", hidden=256, width=256)
    arrays = imatrix_arrays(students_imatrix(tmp_path, "minimax_m2", kept), spec_of(student))
    write_gguf(student, tmp_path / "F16.gguf", name="tiny")
    quantize_gguf(tmp_path / "F16.gguf", tmp_path / "q.gguf", recipe, arrays, 1)
    assert audit([tmp_path / "q.gguf"], student, recipe).bytes_by_class
    assert recipe in RECIPES
    with LlamaCppRuntime(tmp_path / "q.gguf", threads=1, context_length=128) as runtime:
        assert np.isfinite(runtime.logits(some_ids(24))).all()


@pytest.mark.parametrize("family", ONNX)
@torch.no_grad()
def test_onnx_has_real_experts_only_and_computes_the_same(tmp_path, family):
    student, kept = uneven_student(tmp_path, family, **({"layers": 3} | CASES[family]))
    imatrix = students_imatrix(tmp_path, family, kept)
    sizes = {}
    for precision in ("fp32", "int4"):
        out = tmp_path / precision
        weights = None if precision == "fp32" else imatrix
        summary = export_onnx(student, out, precision=precision, imatrix=weights, accuracy_level=0)
        sizes[precision] = summary["bytes_by_class"]["expert"]
    assert np.abs(ort_logits(tmp_path / "fp32") - hf_logits(student)).max() <= MAX_DIFFERENCE
    model = load_model(student)
    without_padding(model)
    stored = with_stored_weights(model, initializers(tmp_path / "int4"))
    stored.set_experts_implementation("eager")
    expected = stored(torch.from_numpy(PROMPT)[None]).logits[0].numpy()
    assert np.abs(ort_logits(tmp_path / "int4") - expected).max() <= MAX_DIFFERENCE
    real = sum(map(len, kept.values()))
    assert sizes["fp32"] >= real * 3 * 64 * 32 * 4 and sizes["fp32"] < (real + 1) * 3 * 64 * 32 * 4
    for layer, ids in kept.items():
        assert len(initializers(tmp_path / "int4")[f"model.layers.{layer}.moe.gate_up.weight_Q4"]) == len(ids)


def test_the_rows_of_the_imatrix_go_with_their_experts_into_onnx(tmp_path):
    """In groups the second group's experts move when padding between them goes."""
    options = {"n_group": 2, "topk_group": 1, "head_dim": 32}
    student, kept = uneven_student(tmp_path, "glm4_moe", **options)
    imatrix = students_imatrix(tmp_path, "glm4_moe", kept)
    real = {layer: spec_of(student).real_experts(layer) for layer in kept}
    assert real[2] == [0, 1, 3, 4]
    for name, choice in (("default", None), ("real", real), ("shifted", real | {2: [0, 1, 2, 3]})):
        export_onnx(student, tmp_path / name, precision="int4", imatrix=imatrix, kept=choice)
    data = {name: (tmp_path / name / "model.onnx.data").read_bytes() for name in ("default", "real", "shifted")}
    assert data["default"] == data["real"] != data["shifted"]


def test_padding_that_is_none_is_refused(tmp_path):
    student, _ = uneven_student(tmp_path, "minimax_m2")
    weights = load_file(student / "model.safetensors")
    bias = next(name for name in weights if name.endswith("layers.1.block_sparse_moe.e_score_correction_bias"))
    weights[bias][5] = 0.1
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputRejected, match="padding experts are not empty"):
        export_onnx(student, tmp_path / "onnx", precision="fp32")


def test_the_table_says_what_each_runtime_does_with_uneven_layers():
    for family in PADDING:
        assert CAPABILITIES["llama_cpp", family].uneven == "padded"
    assert {CAPABILITIES["ort", family].uneven for family in ONNX} == {"ok"} and len(ONNX) == 4
