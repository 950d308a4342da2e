"""Which bits an ONNX file should spend where: KL when one class of tensors alone is quantized, and the best mix at int4's size.

    python -m tests.benchmarks.bench_onnx_bits MODEL PROFILE [--tokens 1024]

MODEL is a checkpoint folder, PROFILE the profile folder of its build (rows and imatrix). Every class, and every third of
its layers, is replaced by what our quantizer makes of it at 4 and at 8 bits (blocks of 32, imatrix-weighted), a few
calibration rows are run, and the weights are put back. Then the integer program of the planner spends the bytes of the
precision "int4" (contracts/onnx_bits.py) anew: the line "best" says what it would choose, and what that is predicted to gain.
"""

import argparse
import json
from collections.abc import Sequence
from math import inf, prod
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_edge.contracts.onnx_bits import fitting_block, stored_bytes
from moe_edge.contracts.quantization import layer_thirds
from moe_edge.export.onnx_quantize import quantize
from moe_edge.models.loading import load_model
from moe_edge.models.taps import decoder_layers
from moe_edge.models.weights import WeightRows, weight_rows
from moe_edge.planning.bits import Sensitivity
from moe_edge.planning.scoring import row_kl
from moe_edge.planning.sensitivity import importance_of
from moe_edge.planning.spend import cheapest
from moe_edge.storage.rows import TokenRows
from moe_edge.storage.statistics import Statistics

BLOCK = 32
INT4 = {"expert": 4, "attention": 8, "shared": 8, "embedding_head": 8}
Cell = tuple[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    model = load_model(options.model)
    rows_NS = TokenRows.load(options.profile / "rows.safetensors").ids_NS
    ids_NS = torch.from_numpy(rows_NS[-max(1, options.tokens // rows_NS.shape[1]) :]).long()
    imatrix = Statistics.load(options.profile / "statistics.safetensors").imatrix
    nats, sizes = _measure(model, ids_NS, imatrix)
    for (name, third), known in nats.items():
        line = {f"kl_nats_{bits}_bits": round(value, 5) for bits, value in known.items()}
        print(json.dumps({"class": name, "third": third, "tokens": ids_NS.numel()} | line), flush=True)
    _best(nats, sizes)


@torch.no_grad()
def _measure(
    model: PreTrainedModel, ids_NS: Tensor, imatrix: dict[str, Tensor]
) -> tuple[dict[Cell, dict[str, float]], dict[Cell, dict[str, int]]]:
    """KL and bytes of every class and third at both widths."""
    reference = list(_logits(model, ids_NS))
    by_cell: dict[Cell, list[WeightRows]] = {}
    thirds = layer_thirds(len(decoder_layers(model)))
    for matrix in weight_rows(model):
        name = "expert" if matrix.bit_class.startswith("expert") else matrix.bit_class
        third = next((place for place, layers in enumerate(thirds) if matrix.layer in layers), 0)
        by_cell.setdefault((name, 0 if name == "embedding_head" else third), []).append(matrix)
    nats: dict[Cell, dict[str, float]] = {}
    sizes: dict[Cell, dict[str, int]] = {}
    for cell, matrices in by_cell.items():
        for bits in (4, 8):
            originals = [matrix.rows.clone() for matrix in matrices]
            for matrix in matrices:
                matrix.rows.copy_(_stored(matrix, bits, imatrix))
            parts = [row_kl(before, after) for before, after in zip(reference, _logits(model, ids_NS), strict=True)]
            for matrix, original in zip(matrices, originals, strict=True):
                matrix.rows.copy_(original)
            nats.setdefault(cell, {})[str(bits)] = max(float(torch.cat(parts).mean()), 0.0)
            sizes.setdefault(cell, {})[str(bits)] = sum(_bytes(matrix, bits) for matrix in matrices)
    return nats, sizes


def _stored(matrix: WeightRows, bits: int, imatrix: dict[str, Tensor]) -> Tensor:
    """A matrix, or a stack of them, as it reads back."""
    importance_EC = importance_of(matrix, imatrix)
    block, stacked = fitting_block(BLOCK, matrix.rows.shape[-1]), matrix.rows.dim() == 3
    parts = []
    for place, rows_RC in enumerate(matrix.rows if stacked else matrix.rows[None]):
        importance = None if importance_EC is None else importance_EC[min(place, len(importance_EC) - 1)][None]
        parts.append(quantize(rows_RC, bits, block, importance).dequantize())
    return torch.stack(parts) if stacked else parts[0]


def _bytes(matrix: WeightRows, bits: int) -> int:
    shape = tuple(matrix.rows.shape)
    return prod(shape[:-2]) * stored_bytes("attention_q", shape[-2:], bits, BLOCK)


def _logits(model: PreTrainedModel, ids_NS: Tensor) -> Sequence[Tensor]:
    return [model(input_ids=ids_S[None], use_cache=False).logits.float() for ids_S in ids_NS]


def _best(nats: dict[Cell, dict[str, float]], sizes: dict[Cell, dict[str, int]]) -> None:
    """The planner's integer program at the bytes of "int4"."""
    known = Sensitivity(nats, "measured")
    cap = sum(table[str(INT4[cell[0]])] for cell, table in sizes.items())
    fixed = sum(table[str(INT4[cell[0]])] for cell, table in nats.items())
    none = {cell: dict.fromkeys(table, 0.0) for cell, table in sizes.items()}
    chosen = cheapest(sizes, none, known, cap * 1.0001, inf)
    assert chosen is not None
    least = sum(nats[cell][bits] for cell, bits in chosen.items())
    changed = {f"{cell[0]}, third {cell[1]}": bits for cell, bits in chosen.items() if bits != str(INT4[cell[0]])}
    print(json.dumps({"best": changed, "kl_nats": round(least, 5), "int4_kl_nats": round(fixed, 5), "bytes": cap}))


if __name__ == "__main__":
    main()
