"""Quantization: every tensor has the type that the recipe pins, deterministically, with and without an imatrix."""

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moe_edge.contracts.errors import ConfigError, InputRejected, ResourceProblem
from moe_edge.contracts.quantization import NEEDS_IMATRIX, RECIPES, pinned_type, tensor_bytes
from moe_edge.exporting import gguf_quantize
from moe_edge.exporting.gguf import write_gguf
from moe_edge.exporting.gguf_layout import class_of
from moe_edge.exporting.gguf_quantize import FILE_TYPES, quantize_gguf
from moe_edge.planning.estimate import Packing, tensor_data_bytes
from moe_edge.planning.headers import model_headers
from moe_edge.runtimes.gguf_header import check_gguf_header
from moe_edge.runtimes.llama_cpp import LlamaCppRuntime
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.exporting.gguf_models import REPRESENTABLE, reference_logits, representable, some_ids


def source(tmp_path: Path, family: str = "qwen2_moe", **kwargs) -> Path:
    path = tmp_path / f"{family}-F16.gguf"
    write_gguf(representable(tmp_path, family, **kwargs), path, name="x")
    return path


@pytest.mark.parametrize("family", REPRESENTABLE)
def test_every_tensor_has_its_pinned_type(tmp_path, family):
    src = source(tmp_path, family, hidden=256, width=48)  # 48: not even 32-blocks fit the down projection
    kinds = quantize_gguf(src, tmp_path / "q.gguf", "Q4_K_M", None, 1)
    tensors = check_gguf_header(tmp_path / "q.gguf").tensors
    assert kinds == {name: tensor.kind for name, tensor in tensors.items()}
    for tensor in tensors.values():
        expected = pinned_type("Q4_K_M", class_of(tensor.name), tensor.shape[-1])
        assert tensor.kind == expected, tensor.name
        assert tensor.bytes == tensor_bytes(expected, tensor.shape)
    seen = model_headers(inspect_checkpoint(tmp_path / f"tiny-{family}", False))
    assert tensor_data_bytes(seen, 6, Packing("gguf", "Q4_K_M")) == sum(tensor.bytes for tensor in tensors.values())
    assert kinds["blk.1.ffn_gate_exps.weight"] == "Q4_K"
    assert kinds["blk.1.ffn_down_exps.weight"] == "F16"
    assert kinds["blk.1.ffn_gate_inp.weight"] == "F32"


def random_imatrix(src: Path) -> dict[str, np.ndarray]:
    """Positive numbers for every matrix of a file."""
    shapes = {name: tensor.shape for name, tensor in check_gguf_header(src).tensors.items()}
    generator = np.random.default_rng(0)
    return {
        name: generator.uniform(0.01, 10, (shape[0] if len(shape) == 3 else 1) * shape[-1]).astype(np.float32)
        for name, shape in shapes.items()
        if len(shape) > 1
    }


@pytest.mark.parametrize("recipe", [*FILE_TYPES, "F16"])
def test_every_recipe_gives_a_model_that_loads(tmp_path, recipe):
    """With an imatrix, which some types demand and the others accept; the planner's bytes are the file's."""
    src, ids = source(tmp_path, hidden=256, width=256), some_ids()
    kinds = quantize_gguf(src, tmp_path / "q.gguf", recipe, random_imatrix(src), 1)
    assert kinds["blk.0.ffn_gate_exps.weight"] == RECIPES[recipe]["expert_gate"]
    assert kinds["blk.1.ffn_down_exps.weight"] == RECIPES[recipe]["expert_down"]
    assert kinds["blk.0.attn_q.weight"] == RECIPES[recipe]["attention_q"]
    seen = model_headers(inspect_checkpoint(tmp_path / "tiny-qwen2_moe", False))
    stored = sum(tensor.bytes for tensor in check_gguf_header(tmp_path / "q.gguf").tensors.values())
    assert tensor_data_bytes(seen, 6, Packing("gguf", recipe)) == stored
    header = check_gguf_header(tmp_path / "q.gguf")
    assert header.metadata["general.file_type"] == FILE_TYPES.get(recipe, 1)
    with LlamaCppRuntime(tmp_path / "q.gguf", threads=1, context_length=64) as runtime:
        assert np.isfinite(runtime.logits(ids)).all()


def test_fallbacks_follow_the_row_length(tmp_path):
    kinds = quantize_gguf(source(tmp_path), tmp_path / "q.gguf", "Q4_K_M", None, 1)  # hidden 64, width 32, shared 48
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_gate_exps.weight"] == "Q5_0"
    assert kinds["blk.0.ffn_down_exps.weight"] == "Q5_1"
    assert kinds["blk.0.ffn_down_shexp.weight"] == "F16"


def test_a_plans_mix_replaces_the_recipes_types(tmp_path):
    """Per class and range of layers; what the mix does not name keeps the recipe, and the planner's bytes hold."""
    mix = {"expert_down@1-1": "Q3_K", "expert_down": "Q2_K", "attention": "Q8_0"}
    src = source(tmp_path, "qwen3_moe", hidden=256, width=256)
    kinds = quantize_gguf(src, tmp_path / "q.gguf", "Q4_K_M", None, 1, mix)
    assert (kinds["blk.0.ffn_down_exps.weight"], kinds["blk.1.ffn_down_exps.weight"]) == ("Q2_K", "Q3_K")
    assert kinds["blk.0.attn_q.weight"] == "Q8_0" and kinds["blk.0.ffn_up_exps.weight"] == "Q4_K"
    assert kinds["blk.1.ffn_gate_inp.weight"] == "F32" and kinds["token_embd.weight"] == "Q6_K"
    with LlamaCppRuntime(tmp_path / "q.gguf", threads=1, context_length=64) as runtime:
        assert np.isfinite(runtime.logits(some_ids())).all()
    packing = Packing("gguf", "Q4_K_M", mix=tuple(mix.items()))
    seen = model_headers(inspect_checkpoint(tmp_path / "tiny-qwen3_moe", False))
    stored = sum(tensor.bytes for tensor in check_gguf_header(tmp_path / "q.gguf").tensors.values())
    assert tensor_data_bytes(seen, 6, packing) == stored


def test_bytes_do_not_depend_on_threads_or_on_the_run(tmp_path):
    src = source(tmp_path)
    for name, threads in (("a", 1), ("b", 2)):
        quantize_gguf(src, tmp_path / f"{name}.gguf", "Q4_K_M", None, threads)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_an_imatrix_changes_the_weights_and_keeps_the_types(tmp_path):
    src = source(tmp_path)
    imatrix = random_imatrix(src)
    plain = quantize_gguf(src, tmp_path / "plain.gguf", "Q4_K_M", None, 1)
    assert quantize_gguf(src, tmp_path / "weighted.gguf", "Q4_K_M", imatrix, 1) == plain
    assert (tmp_path / "plain.gguf").read_bytes() != (tmp_path / "weighted.gguf").read_bytes()


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "ernie4_5_moe", "gpt_oss"])
def test_q8_stays_close_to_transformers(tmp_path, family):
    checkpoint, ids = representable(tmp_path, family), some_ids()
    write_gguf(checkpoint, tmp_path / "f.gguf", name="x")
    quantize_gguf(tmp_path / "f.gguf", tmp_path / "q.gguf", "Q8_0", None, 1)
    expected = reference_logits(checkpoint, ids)
    with LlamaCppRuntime(tmp_path / "q.gguf", threads=1, context_length=64) as runtime:
        error = np.abs(runtime.logits(ids) - expected)
    assert np.quantile(error, 0.9) < 0.1 * expected.std()


@pytest.mark.parametrize("recipe", sorted(NEEDS_IMATRIX))
def test_a_type_that_needs_an_imatrix_is_refused_without_one(tmp_path, recipe):
    src = source(tmp_path, hidden=256, width=256)
    with pytest.raises(ConfigError, match=rf"{recipe} needs an importance matrix[\s\S]*moe-edge profile"):
        quantize_gguf(src, tmp_path / "q.gguf", recipe, None, 1)
    partial = {name: values for name, values in random_imatrix(src).items() if "blk.1.ffn_up" not in name}
    with pytest.raises(ConfigError, match=r"blk\.1\.ffn_up_exps\.weight"):
        quantize_gguf(src, tmp_path / "q.gguf", recipe, partial, 1)
    assert not list(tmp_path.glob("q.gguf*"))


def test_codebook_types_fall_back_to_their_small_block(tmp_path):
    """Rows of 64 and 32: no imatrix is needed any more, because IQ4_NL does without."""
    kinds = quantize_gguf(source(tmp_path), tmp_path / "q.gguf", "IQ2_XS", None, 1)
    assert kinds["blk.0.ffn_gate_exps.weight"] == kinds["blk.0.ffn_down_exps.weight"] == "IQ4_NL"


def test_float16_with_a_mix_is_mixed(tmp_path):
    kinds = quantize_gguf(source(tmp_path), tmp_path / "q.gguf", "F16", None, 1, {"expert_down": "Q8_0"})
    assert kinds["blk.0.ffn_down_exps.weight"] == "Q8_0" and kinds["blk.0.ffn_up_exps.weight"] == "F16"


@pytest.mark.parametrize("values", [np.ones(7), np.full(6 * 64, np.nan)])
def test_an_imatrix_that_does_not_fit_is_refused(tmp_path, values):
    with pytest.raises(InputRejected, match="importance matrix"):
        quantize_gguf(source(tmp_path), tmp_path / "q.gguf", "Q4_K_M", {"blk.0.ffn_gate_exps.weight": values}, 1)


def test_unknown_recipes_and_quantized_sources_are_refused(tmp_path):
    src = source(tmp_path)
    with pytest.raises(ConfigError, match="Q9"):
        quantize_gguf(src, tmp_path / "q.gguf", "Q9", None, 1)
    quantize_gguf(src, tmp_path / "q8.gguf", "Q8_0", None, 1)
    with pytest.raises(InputRejected, match="requantizing"):
        quantize_gguf(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_K_M", None, 1)
    assert not (tmp_path / "q4.gguf").exists()


def test_types_that_differ_from_the_recipe_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(
        gguf_quantize, "_overrides", lambda wanted: (gguf_quantize.lib.llama_model_tensor_override * 1)()
    )
    with pytest.raises(InputRejected, match="other types"):
        quantize_gguf(source(tmp_path), tmp_path / "q.gguf", "Q4_K_M", None, 1)


def test_a_full_disk_is_reported_before_writing(tmp_path, monkeypatch):
    src = source(tmp_path)
    monkeypatch.setattr(gguf_quantize.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(ResourceProblem, match="disk"):
        quantize_gguf(src, tmp_path / "q.gguf", "Q8_0", None, 1)


def test_nothing_is_printed(tmp_path, capfd, caplog):
    with caplog.at_level(logging.DEBUG, logger="moe_edge"):
        quantize_gguf(source(tmp_path), tmp_path / "q.gguf", "Q4_K_M", None, 1)
    printed = capfd.readouterr()
    assert "llama" not in printed.out + printed.err
    assert "converting" in caplog.text or "quant" in caplog.text
