"""Qwen3-30B-A3B as headers only: config.json from the public numbers, and a safetensors file that is a hole on disk."""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 48, "num_experts": 128,
    "num_experts_per_tok": 8, "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "norm_topk_prob": True,
    "tie_word_embeddings": False, "hidden_act": "silu", "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False,
}  # fmt: skip


def write_headers_only(folder: Path) -> Path:
    """A checkpoint folder of 61 GB that takes a few MB of disk: every header is real, no weight is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}, "merges": []}}))
    header, offset = {}, 0
    for name, shape in _tensors():
        stop = offset + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
    return folder


def _tensors() -> Iterator[tuple[str, list[int]]]:
    hidden, vocab, head = CONFIG["hidden_size"], CONFIG["vocab_size"], CONFIG["head_dim"]
    width, queries = CONFIG["moe_intermediate_size"], CONFIG["num_attention_heads"] * head
    keys = CONFIG["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", [vocab, hidden]
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, shape in (
            ("input_layernorm", [hidden]), ("post_attention_layernorm", [hidden]),
            ("self_attn.q_proj", [queries, hidden]), ("self_attn.k_proj", [keys, hidden]),
            ("self_attn.v_proj", [keys, hidden]), ("self_attn.o_proj", [hidden, queries]),
            ("self_attn.q_norm", [head]), ("self_attn.k_norm", [head]), ("mlp.gate", [CONFIG["num_experts"], hidden]),
        ):  # fmt: skip
            yield f"{at}{name}.weight", shape
        for expert in range(CONFIG["num_experts"]):
            yield f"{at}mlp.experts.{expert}.gate_proj.weight", [width, hidden]
            yield f"{at}mlp.experts.{expert}.up_proj.weight", [width, hidden]
            yield f"{at}mlp.experts.{expert}.down_proj.weight", [hidden, width]
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [vocab, hidden]
