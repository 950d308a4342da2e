"""Dense students as ONNX: transformers' logits, genai's tokens, and four bits where most of the weights are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.onnx_bits import PRECISIONS
from moe_edge.exporting.onnx import export_onnx
from moe_edge.families import DENSE_FAMILIES, FAMILIES, family_of, student_family
from moe_edge.formulas.ffn import Ffn
from moe_edge.models.dense import DENSE_OF, build_dense
from moe_edge.models.loading import save_student
from moe_edge.models.students import count_params, describe_student
from moe_edge.runtimes.base import generate
from moe_edge.runtimes.hf import HfRuntime
from moe_edge.runtimes.ort import OrtRuntime
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.exporting.gguf_models import LLAMA3, llama_checkpoint, some_ids
from tests.exporting.onnx_models import MAX_DIFFERENCE, PROMPT, genai_greedy, hf_logits, kl_nats, ort_logits
from tests.tiny import tiny_checkpoint, tiny_model

WIDTH, VOCAB = 96, 300
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "attention_bias": True,
    "bos_token_id": None,
    "pad_token_id": 0,
}


def dense_model(kind: str) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(1)
    if kind == "llama":
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA), dtype=torch.float32).eval()
    family = next(name for name, dense in DENSE_OF.items() if dense == kind)
    model = tiny_model(family, vocab=VOCAB, **({"sliding_window": 6} if kind == "mistral" else {}))
    shapes = [(WIDTH, 64), (WIDTH, 64), (64, WIDTH)]
    networks = [Ffn(*(0.3 * torch.randn(*shape, generator=generator) for shape in shapes)) for _ in range(2)]
    return build_dense(model, networks)


def dense_checkpoint(tmp_path: Path, kind: str) -> Path:
    save_student(dense_model(kind), tiny_checkpoint(tmp_path, "qwen3_moe", name="tokenizer"), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", DENSE_FAMILIES)
def test_float32_is_exact_and_decodes_the_same_tokens(kind: str, tmp_path: Path) -> None:
    checkpoint = dense_checkpoint(tmp_path, kind)
    export_onnx(checkpoint, tmp_path / "onnx", precision="fp32")
    assert np.abs(ort_logits(tmp_path / "onnx") - hf_logits(checkpoint)).max() <= MAX_DIFFERENCE
    answer = genai_greedy(tmp_path / "onnx", 16)
    with HfRuntime(checkpoint, 1, 256) as hf:
        assert answer and answer == generate(hf, PROMPT, 16)[: len(answer)]


def test_llama_3s_rotation_is_exact_far_beyond_its_original_context(tmp_path: Path) -> None:
    folder = llama_checkpoint(tmp_path, rope_parameters=LLAMA3)
    export_onnx(folder, tmp_path / "onnx", precision="fp32")
    ids_S = some_ids(200)
    with OrtRuntime(tmp_path / "onnx", threads=1, context_length=256) as runtime:
        assert np.abs(runtime.logits(ids_S) - hf_logits(folder, ids_S)).max() <= MAX_DIFFERENCE


@pytest.mark.parametrize("kind", DENSE_FAMILIES)
def test_precisions_shrink_it_and_int4_means_the_feed_forward_blocks(kind: str, tmp_path: Path) -> None:
    checkpoint = dense_checkpoint(tmp_path, kind)
    expected, sizes = hf_logits(checkpoint), []
    for precision, bound in {"fp16": 1e-4, "int8": 0.01, "int4": 0.1}.items():
        summary = export_onnx(checkpoint, tmp_path / precision, precision=precision)
        assert kl_nats(expected, ort_logits(tmp_path / precision)) <= bound
        assert summary["bits"]["shared"] == [PRECISIONS[precision]["expert"]]
        sizes.append(summary["bytes"])
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


@pytest.mark.parametrize("kind", DENSE_FAMILIES)
def test_a_dense_row_describes_what_transformers_saves(kind: str, tmp_path: Path) -> None:
    headers = inspect_checkpoint(dense_checkpoint(tmp_path, kind))
    family = student_family(headers.config)
    spec = family.spec(headers.config)
    counts = count_params(spec, family.tensors(headers.config, headers.tensors))
    if kind in DENSE_OF.values():
        assert counts.total == counts.active == describe_student(headers)["params_total"]
    assert spec.moe_layers == () and spec.dense_width == WIDTH and counts.routed == 0
    assert kind not in FAMILIES
    with pytest.raises(InputRejected, match="dense"):
        family_of(headers.config)
