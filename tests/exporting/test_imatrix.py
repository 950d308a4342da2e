"""The importance matrix: names, per-expert means, blending, kept experts and llama.cpp's file format."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_edge.contracts.spec import ModelSpec, MoESpec
from moe_edge.exporting.gguf import write_gguf
from moe_edge.exporting.gguf_quantize import quantize_gguf
from moe_edge.exporting.imatrix import imatrix_arrays, write_imatrix_gguf
from moe_edge.families import family_of
from moe_edge.formulas.importance import PRIOR_TOKENS
from moe_edge.profiling.sums import to_statistics
from moe_edge.runtimes.gguf_header import check_gguf_header
from moe_edge.storage.statistics import TENSOR_FIELDS, Statistics
from tests.exporting.gguf_models import representable
from tests.profiling.runs import whole_pass

LAYERS, EXPERTS, DIM, WIDTH, SHARED = 2, 6, 64, 32, 48


def spec(shared: int = SHARED, tied: bool = False, experts: int = EXPERTS) -> ModelSpec:
    moe = MoESpec(experts, 2, WIDTH, "softmax", False, shared, bool(shared))
    return ModelSpec("qwen2_moe", LAYERS, DIM, 4, 2, 16, 320, 256, 1e-6, 1e4, tied, True, "none", moe)


def sums(seed: int = 0, shared: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "attention_in": (LAYERS, DIM),
        "attention_o": (LAYERS, DIM),
        "ffn_in": (LAYERS, DIM),
        "expert_in": (LAYERS, EXPERTS, DIM),
        "expert_down": (LAYERS, EXPERTS, WIDTH),
        "head_in": (DIM,),
    }
    shapes |= {"shared_down": (LAYERS, SHARED)} if shared else {}
    values = {key: torch.rand(shape, generator=generator, dtype=torch.float64) * 1000 for key, shape in shapes.items()}
    values["expert_count"] = torch.full((LAYERS, EXPERTS), 1000, dtype=torch.int64)
    values["dense_count"] = torch.tensor(3000)
    return values


def test_dense_inputs_are_divided_by_the_tokens():
    values = sums()
    arrays = imatrix_arrays(values, spec(), None)
    expected = (values["attention_in"][1] / 3000).numpy()
    for name in ("attn_q", "attn_k", "attn_v"):
        np.testing.assert_allclose(arrays[f"blk.1.{name}.weight"], expected, rtol=1e-6)
    np.testing.assert_allclose(arrays["output.weight"], (values["head_in"] / 3000).numpy(), rtol=1e-6)
    assert arrays["blk.0.ffn_down_shexp.weight"].shape == (SHARED,)
    assert "token_embd.weight" not in arrays


def test_experts_are_blended_with_the_layers_mean():
    values = sums()
    values["expert_count"][0] = torch.tensor([1000, 1000, 1000, 10, 0, 1000])
    values["expert_in"][0, 4] = 0
    total = values["expert_in"][0].sum(0).numpy() / values["expert_count"][0].sum().item()
    arrays = imatrix_arrays(values, spec(), None)
    actual = arrays["blk.0.ffn_gate_exps.weight"].reshape(EXPERTS, DIM)
    expected = (values["expert_in"][0, 3].numpy() + PRIOR_TOKENS * total) / (10 + PRIOR_TOKENS)
    np.testing.assert_allclose(actual[3], expected, rtol=1e-6)
    np.testing.assert_allclose(actual[4], total, rtol=1e-6)  # never used: the mean of the layer
    np.testing.assert_array_equal(arrays["blk.0.ffn_up_exps.weight"], arrays["blk.0.ffn_gate_exps.weight"])


def test_kept_experts_are_indexed_by_the_plan():
    kept = {0: [0, 2, 5], 1: [1, 3, 4]}
    full = imatrix_arrays(sums(), spec(), None)["blk.1.ffn_down_exps.weight"].reshape(EXPERTS, WIDTH)
    some = imatrix_arrays(sums(), spec(experts=3), kept)["blk.1.ffn_down_exps.weight"].reshape(3, WIDTH)
    assert np.corrcoef(some.ravel(), full[kept[1]].ravel())[0, 1] > 0.99


@pytest.mark.parametrize("broken", [0.0, float("nan"), float("inf")])
def test_everything_is_finite_and_positive(broken):
    values = sums()
    values["expert_in"][0] = broken
    values["attention_in"][0, :5] = 0
    values["expert_count"][1] = 0
    for name, array in imatrix_arrays(values, spec(), None).items():
        assert np.isfinite(array).all() and (array > 0).all(), name
        assert array.dtype == np.float32


def test_models_without_a_shared_expert_have_no_shared_entries():
    arrays = imatrix_arrays(sums(shared=False), spec(shared=0, tied=True), None)
    assert not [name for name in arrays if "shexp" in name]
    np.testing.assert_array_equal(arrays["token_embd.weight"], arrays["output.weight"])


def test_dense_layers_have_their_own_entries_and_experts_count_from_the_first_moe_layer():
    values = sums()
    generator = torch.Generator().manual_seed(1)
    values |= {
        "dense_in": torch.rand(LAYERS, DIM, generator=generator),
        "dense_down": torch.rand(LAYERS, WIDTH, generator=generator),
        "expert_in": values["expert_in"][1:],
        "expert_down": values["expert_down"][1:],
        "expert_count": values["expert_count"][1:],
    }
    ernie = replace(spec(), family="ernie4_5_moe", dense_layers=(0,), dense_width=WIDTH)
    arrays = imatrix_arrays(values, ernie, {1: [0, 2, 5]})
    np.testing.assert_allclose(arrays["blk.0.ffn_up.weight"], values["dense_in"][0].numpy() / 3000, rtol=1e-6)
    assert arrays["blk.0.ffn_down.weight"].shape == (WIDTH,) and "blk.1.ffn_down.weight" not in arrays
    assert "blk.0.ffn_gate_shexp.weight" not in arrays and "blk.0.ffn_gate_exps.weight" not in arrays
    expected = values["expert_in"][0, [0, 2, 5]].numpy().ravel()
    assert np.corrcoef(arrays["blk.1.ffn_gate_exps.weight"], expected)[0, 1] > 0.99


def test_the_quantizer_accepts_it(tmp_path):
    write_gguf(representable(tmp_path, "qwen2_moe"), tmp_path / "f.gguf", name="x")
    arrays = imatrix_arrays(sums(), spec(), None)
    kinds = quantize_gguf(tmp_path / "f.gguf", tmp_path / "q.gguf", "Q3_K_M", arrays, 1)
    quantized = {name for name, kind in kinds.items() if kind not in ("F32", "F16")}
    assert quantized - set(arrays) == {"token_embd.weight"}


@pytest.mark.parametrize("family", ["granitemoeshared", "ernie4_5_moe", "gpt_oss"])
def test_a_profile_weighs_every_matrix_of_the_pruned_file(tmp_path, family):
    """From the teacher's six experts to a student with four, with dense layers, shared experts and biases."""
    teacher = representable(tmp_path, family)
    statistics = to_statistics(whole_pass(teacher, tmp_path / "partial"), {})
    student = representable(tmp_path, family, experts=4, name="student")
    config = json.loads((student / "config.json").read_text())
    student_spec = family_of(config).spec(config)
    kept = {layer: [0, 2, 3, 5] for layer in student_spec.moe_layers}
    write_gguf(student, tmp_path / "f.gguf", name="x")
    arrays = imatrix_arrays(statistics.imatrix, student_spec, kept)
    kinds = quantize_gguf(tmp_path / "f.gguf", tmp_path / "q.gguf", "Q4_K_M", arrays, 1)
    quantized = {name for name, kind in kinds.items() if kind not in ("F32", "F16")}
    assert quantized - set(arrays) == {"token_embd.weight"} and set(arrays) <= set(kinds)
    shapes = {name: tensor.shape for name, tensor in check_gguf_header(tmp_path / "q.gguf").tensors.items()}
    assert all(array.size == np.prod(shapes[name]) // shapes[name][-2] for name, array in arrays.items())


def test_llama_cpps_own_file_format(tmp_path):
    imatrix = sums()
    empty = dict.fromkeys(TENSOR_FIELDS, torch.zeros(1))
    statistics = Statistics(**empty, cka_tokens=0, tokens=3000, imatrix=imatrix, meta={"calibration_digest": "abc"})
    for name in ("a", "b"):
        write_imatrix_gguf(tmp_path / f"{name}.gguf", statistics, spec())
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    header = check_gguf_header(tmp_path / "a.gguf")
    assert header.metadata["general.type"] == "imatrix"
    assert header.metadata["imatrix.datasets"] == ["abc"]
    assert header.metadata["imatrix.chunk_count"] == 6
    sum2 = header.tensors["blk.1.ffn_gate_exps.weight.in_sum2"]
    counts = header.tensors["blk.1.ffn_gate_exps.weight.counts"]
    assert (sum2.shape, counts.shape) == ((EXPERTS, DIM), (EXPERTS, 1))
    data = (tmp_path / "a.gguf").read_bytes()[header.data_start + sum2.offset :][: sum2.bytes]
    stored = np.frombuffer(data, np.float32).reshape(EXPERTS, DIM)
    np.testing.assert_allclose(stored, imatrix["expert_in"][1].numpy(), rtol=1e-6)
    assert header.tensors["blk.0.attn_q.weight.counts"].shape == (1, 1)
