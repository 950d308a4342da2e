"""The imatrix file against a slow reference: float64, one token after the other, one expert after the other."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_edge.exporting.gguf import write_gguf
from moe_edge.exporting.gguf_quantize import quantize_gguf
from moe_edge.exporting.imatrix import imatrix_arrays, write_imatrix_gguf
from moe_edge.families import family_of
from moe_edge.models.loading import load_model
from moe_edge.profiling.sums import to_statistics
from moe_edge.runtimes.gguf_header import check_gguf_header
from tests.exporting.gguf_models import REPRESENTABLE, representable
from tests.profiling.runs import ROWS, TOKENS, whole_pass
from tests.tiny import tiny_ids

_EXPERTS = ("blk.{}.ffn_gate_exps.weight", "blk.{}.ffn_up_exps.weight", "blk.{}.ffn_down_exps.weight")
# family -> where its blocks are, and which matrix of the file reads what: GGUF name -> module below the layer
MATRICES: dict[str, tuple[str, dict[str, str]]] = {
    "qwen2_moe": ("mlp", {
        "blk.{}.attn_q.weight": "self_attn.q_proj", "blk.{}.attn_v.weight": "self_attn.v_proj",
        "blk.{}.attn_output.weight": "self_attn.o_proj", "blk.{}.ffn_up_shexp.weight": "mlp.shared_expert.up_proj",
        "blk.{}.ffn_down_shexp.weight": "mlp.shared_expert.down_proj",
    }),
    "deepseek_v3": ("mlp", {
        "blk.{}.attn_q_a.weight": "self_attn.q_a_proj", "blk.{}.attn_q_b.weight": "self_attn.q_b_proj",
        "blk.{}.attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa", "blk.{}.attn_v_b.weight": "self_attn.kv_b_proj",
        "blk.{}.attn_output.weight": "self_attn.o_proj", "blk.{}.ffn_gate.weight": "mlp.gate_proj",
        "blk.{}.ffn_down.weight": "mlp.down_proj", "blk.{}.ffn_down_shexp.weight": "mlp.shared_experts.down_proj",
    }),
    "lfm2_moe": ("feed_forward", {
        "blk.{}.shortconv.in_proj.weight": "conv.in_proj", "blk.{}.shortconv.out_proj.weight": "conv.out_proj",
        "blk.{}.attn_k.weight": "self_attn.k_proj", "blk.{}.attn_output.weight": "self_attn.out_proj",
        "blk.{}.ffn_down.weight": "feed_forward.w2",
    }),
    "qwen3_5_moe": ("mlp", {
        "blk.{}.attn_qkv.weight": "linear_attn.in_proj_qkv", "blk.{}.attn_gate.weight": "linear_attn.in_proj_z",
        "blk.{}.ssm_out.weight": "linear_attn.out_proj", "blk.{}.attn_q.weight": "self_attn.q_proj",
    }),
}  # fmt: skip


class Reference:
    """Sums of squares and counts, token by token."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self.counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))

    def add(self, name: str, row: int, token_D: Tensor) -> None:
        old = self.sums[name].get(row, torch.zeros(len(token_D), dtype=torch.float64))
        self.sums[name][row] = old + token_D**2
        self.counts[name][row] += 1

    def listen(self, module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(
            lambda _, inputs: (
                [self.add(name, 0, token) for token in inputs[0].reshape(-1, inputs[0].shape[-1])] and None
            )
        )

    def listen_to_experts(self, experts: nn.Module, layer: int) -> None:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            hidden_TD, index_TK, _weights = inputs
            for token_D, chosen_K in zip(hidden_TD, index_TK.tolist(), strict=True):
                for expert in chosen_K:
                    gate_F, up_F = (experts.gate_up_proj[expert] @ token_D).chunk(2)
                    for name in _EXPERTS[:2]:
                        self.add(name.format(layer), expert, token_D)
                    self.add(_EXPERTS[2].format(layer), expert, functional.silu(gate_F) * up_F)

        experts.register_forward_pre_hook(see)


@torch.no_grad()
def reference(checkpoint: Path, family: str) -> Reference:
    model, found = load_model(checkpoint).double(), Reference()
    model.set_experts_implementation("eager")
    block, matrices = MATRICES[family]
    for layer, module in enumerate(model.model.layers):
        modules = dict(module.named_modules())
        for name, path in matrices.items():
            if path in modules:
                found.listen(modules[path], name.format(layer))
        if f"{block}.experts" in modules:
            found.listen_to_experts(modules[f"{block}.experts"], layer)
    for row_S in tiny_ids(TOKENS, ROWS):
        model(row_S[None])
    return found


def stored(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of an imatrix file."""
    header, data = check_gguf_header(path), path.read_bytes()
    return {
        name: np.frombuffer(data, np.float32, tensor.bytes // 4, header.data_start + tensor.offset).reshape(
            tensor.shape
        )
        for name, tensor in header.tensors.items()
    }


def dealt_out(columns: Tensor, key_heads: int = 2, per_key: int = 2) -> Tensor:
    """Value heads as llama.cpp orders them: the first of every key head, then the second."""
    heads = columns.chunk(key_heads * per_key)
    return torch.cat([heads[key * per_key + number] for number in range(per_key) for key in range(key_heads)])


@pytest.mark.parametrize("family", MATRICES)
def test_the_file_holds_the_sums_of_a_slow_reference(tmp_path, family):
    checkpoint = representable(tmp_path, family)
    statistics = to_statistics(whole_pass(checkpoint, tmp_path / "partial"), {})
    config = load_model(checkpoint).config.to_dict()
    write_imatrix_gguf(tmp_path / "imatrix.gguf", statistics, family_of(config).spec(config))
    file, slow = stored(tmp_path / "imatrix.gguf"), reference(checkpoint, family)
    assert len(slow.sums) >= len(MATRICES[family][1]) + 3  # every module of the table was heard
    for name, rows in slow.sums.items():
        sums, counts = file[f"{name}.in_sum2"], file[f"{name}.counts"]
        assert sums.shape[0] == counts.shape[0] and counts.shape[1] == 1
        for row, expected_D in rows.items():
            expected_D = dealt_out(expected_D) if "ssm_out" in name else expected_D
            np.testing.assert_allclose(sums[row], expected_D.numpy(), rtol=1e-4, err_msg=f"{name}, row {row}")
            assert counts[row, 0] == slow.counts[name][row], name
        if name.endswith("v_b.weight"):  # one matrix per head, all of them read the latent
            assert len(sums) == 4 and (sums == sums[0]).all()


@pytest.mark.parametrize("family", REPRESENTABLE)
def test_every_entry_belongs_to_a_matrix_and_every_matrix_but_two_has_one(tmp_path, family):
    """The embedding has none unless it is the head; keys of latent attention read q per head, which no pass sums up."""
    checkpoint = representable(tmp_path, family)
    statistics = to_statistics(whole_pass(checkpoint, tmp_path / "partial"), {})
    config = load_model(checkpoint).config.to_dict()
    arrays = imatrix_arrays(statistics.imatrix, family_of(config).spec(config))
    write_gguf(checkpoint, tmp_path / "f.gguf", name="x")
    kinds = quantize_gguf(tmp_path / "f.gguf", tmp_path / "q.gguf", "Q8_0", arrays, 1)
    matrices = {name for name, kind in kinds.items() if kind != "F32"}
    assert set(arrays) <= matrices
    assert {name for name in matrices - set(arrays) if not name.endswith("attn_k_b.weight")} == {"token_embd.weight"}
