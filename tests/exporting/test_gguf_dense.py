"""Dense students in GGUF: the plain classes and the single expert give transformers' logits, refusals keep their words."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_edge.contracts.errors import InputRejected
from moe_edge.exporting.gguf import write_gguf
from moe_edge.exporting.gguf_audit import audit
from moe_edge.families import DENSE_FAMILIES, family_of, student_family
from moe_edge.formulas.ffn import Ffn
from moe_edge.models.dense import DENSE_OF, build_dense, build_single_expert
from moe_edge.models.loading import save_student
from moe_edge.runtimes import open_runtime
from moe_edge.runtimes.base import generate
from moe_edge.runtimes.gguf_header import check_gguf_header
from moe_edge.runtimes.llama_cpp import LlamaCppRuntime
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.exporting.gguf_models import LLAMA3, llama_checkpoint, reference_logits, representable, some_ids
from tests.tiny import tiny_model

WIDTH = 40


def networks(layers: int, hidden: int = 64) -> list[Ffn]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(WIDTH, hidden), (WIDTH, hidden), (hidden, WIDTH)]
    return [Ffn(*(0.1 * torch.randn(*shape, generator=generator) for shape in shapes)) for _ in range(layers)]


def dense_student(tmp_path: Path, family: str, **options) -> Path:
    """A folder with the dense class of `family`."""
    tokenizer = representable(tmp_path, "qwen3_moe", name="tokenizer")
    vocab = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    model = build_dense(tiny_model(family, vocab=vocab, **options), networks(2))
    save_student(model, tokenizer, tmp_path / "student")
    return tmp_path / "student"


def assert_same(student: Path, tokens: int = 48) -> None:
    ids = some_ids(tokens)
    write_gguf(student, student.with_suffix(".gguf"), name="x")
    with open_runtime("hf", student, threads=1, context_length=256) as expected:
        logits_SV, tokens = expected.logits(ids), generate(expected, ids[:16], 8)
    with LlamaCppRuntime(student.with_suffix(".gguf"), threads=1, context_length=256, kv_float32=True) as runtime:
        assert np.abs(runtime.logits(ids) - logits_SV).max() <= 2e-2
        assert generate(runtime, ids[:16], 8) == tokens


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", DENSE_OF)
def test_a_dense_student_equals_transformers(tmp_path, family, tied):
    student = dense_student(tmp_path, family, tied=tied)
    assert_same(student)
    header = check_gguf_header(student.with_suffix(".gguf"))
    architecture = header.metadata["general.architecture"]
    assert architecture == {"mistral": "llama"}.get(DENSE_OF[family], DENSE_OF[family])
    assert header.metadata[f"{architecture}.feed_forward_length"] == WIDTH
    assert not [key for key in header.metadata if "expert" in key]
    assert ("output.weight" in header.tensors) != tied


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_equals_transformers(tmp_path, tied):
    student = llama_checkpoint(tmp_path, tie_word_embeddings=tied)
    assert_same(student)
    header = check_gguf_header(student.with_suffix(".gguf"))
    assert header.metadata["general.architecture"] == "llama" and "rope_freqs.weight" not in header.tensors


def test_llama_3s_rotation_is_right_far_beyond_its_original_context(tmp_path):
    student = llama_checkpoint(tmp_path, rope_parameters=LLAMA3)
    assert_same(student, tokens=200)
    audit([student.with_suffix(".gguf")], student, "F16")
    assert check_gguf_header(student.with_suffix(".gguf")).tensors["rope_freqs.weight"].shape == (8,)
    plain = llama_checkpoint(
        tmp_path, rope_parameters={"rope_type": "default", "rope_theta": LLAMA3["rope_theta"]}, name="plain"
    )
    scaled_SV, plain_SV = (reference_logits(folder, some_ids(200)) for folder in (student, plain))
    assert np.abs(scaled_SV - plain_SV).max() > 0.5  # so that the test would see a rotation without divisors


@pytest.mark.parametrize("changes", [{"rope_type": "dynamic"}, {"rope_type": "linear"}])
def test_another_scaling_of_a_llama_is_refused_by_name(tmp_path, changes):
    student = llama_checkpoint(tmp_path, rope_parameters=LLAMA3 | changes)
    with pytest.raises(InputRejected, match=f"of type llama3 only.*{changes['rope_type']}"):
        write_gguf(student, tmp_path / "x.gguf", name="x")


@pytest.mark.parametrize("family", ["olmoe", "granitemoeshared"])
def test_a_family_without_a_dense_class_is_stored_with_one_expert(tmp_path, family):
    source = representable(tmp_path, family, top_k=1)
    overrides = {"clip_qkv": None, "num_key_value_heads": 4} if family == "olmoe" else {}
    vocab = json.loads((source / "config.json").read_text())["vocab_size"]
    model = tiny_model(family, vocab=vocab, top_k=1, **overrides)
    model = build_single_expert(model, networks(2), lambda view: 1.0)
    save_student(model, source, tmp_path / "student")
    assert_same(tmp_path / "student")


def test_every_dense_class_is_described_like_a_family(tmp_path):
    assert set(DENSE_FAMILIES) == {*DENSE_OF.values(), "llama"}
    headers = inspect_checkpoint(dense_student(tmp_path, "qwen2_moe"))
    spec = student_family(headers.config).spec(headers.config)
    assert (spec.moe_layers, spec.dense_layers, spec.dense_width) == ((), (0, 1), WIDTH)
    entries = student_family(headers.config).tensors(headers.config, headers.tensors)
    assert {source for entry in entries for source in entry.sources} == set(headers.tensors)
    with pytest.raises(InputRejected, match="dense"):
        family_of(headers.config)  # a dense model is no teacher


def test_a_dense_student_that_llama_cpp_would_compute_differently_is_refused(tmp_path):
    student = dense_student(tmp_path, "mixtral")
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"sliding_window": 16}))
    with pytest.raises(InputRejected, match="sliding window"):
        write_gguf(student, tmp_path / "x.gguf", name="x")
