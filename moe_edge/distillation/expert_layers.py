"""Which of the teacher's experts see the text as which of the student's layers do: expert-to-layer CKA.

Every teacher expert runs on every token of a few rows and its outputs are compared with the residual stream behind every
student layer, which is what a feature loss of distillation acts on. A layer's best-aligned experts are the ones whose
features it already carries; the worst-aligned are those that it could learn from. Sums over blocks, divided once at the end
(Nguyen et al. 2021, arXiv:2010.15327, eq. 3); sink tokens of any layer are dropped everywhere, so that all pairs are judged
on the same tokens; rows are normalised, because CKA would otherwise hang on the largest tokens.

Shape suffixes: L MoE layers of the teacher, E experts, J layers of the student, N rows, S tokens of a row, T tokens of a
block, D widths (the teacher's and the student's may differ).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_edge.formulas.cka import cka_across, gram, hsic_across, normalise_rows, sink_mask
from moe_edge.models.taps import Outputs, body, decoder_layers, recorded_outputs
from moe_edge.models.views import MoELayerView, expert_outputs, moe_layers
from moe_edge.process.progress import track
from moe_edge.storage.files import write_json_atomic

BLOCK_TOKENS = 256
TABLE_SCHEMA = "moe-edge/expert-layers@1"


@torch.no_grad()
def expert_layer_cka(teacher: PreTrainedModel, student: PreTrainedModel, ids_NS: Tensor) -> Tensor:
    """Debiased CKA of every teacher expert with the output of every student layer, [L, E, J] float64.

    Args:
        student: any causal language model with the teacher's vocabulary, dense ones included.
        ids_NS: rows of text; about 4,096 tokens settle the second decimal.
    """
    views, layers = moe_layers(teacher), decoder_layers(student)
    sizes = ((views[0].count, len(layers)), (views[0].count,), (len(layers),))
    sums = [[torch.zeros(size, dtype=torch.float64) for size in sizes] for _ in views]
    for ids_S in track(ids_NS, "expert-to-layer CKA"):
        hidden, layer_JSD = _row(teacher, student, views, ids_S)
        usable_S = ~_sinks(hidden, layer_JSD)
        for token_T in torch.split(usable_S.nonzero().squeeze(-1), BLOCK_TOKENS):
            layer_JTT = gram(normalise_rows(layer_JSD[:, token_T]))
            for total, view in zip(sums, views, strict=True):
                expert_ETT = gram(normalise_rows(expert_outputs(view, hidden[view.index][token_T])))
                parts = hsic_across(expert_ETT.to(layer_JTT.device), layer_JTT.clone())
                for part, addend in zip(total, parts, strict=True):
                    part += addend.cpu()
    return torch.stack([cka_across(*total) for total in sums])


def _row(
    teacher: PreTrainedModel, student: PreTrainedModel, views: list[MoELayerView], ids_S: Tensor
) -> tuple[Mapping[int, Tensor], Tensor]:
    """(what the experts of every teacher layer read [S, D], what every student layer returns [J, S, D]) on one row."""
    hidden: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            hidden[index] = inputs[0]

        return hook

    handles = [view.experts.register_forward_pre_hook(keep(view.index)) for view in views]
    try:
        body(teacher)(input_ids=ids_S[None].to(teacher.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    recorded, layers = Outputs(), decoder_layers(student)
    with recorded_outputs(layers, recorded):
        body(student)(input_ids=ids_S[None].to(student.device), use_cache=False)
    outputs = [
        recorded[index][0] if isinstance(recorded[index], tuple) else recorded[index] for index in range(len(layers))
    ]
    return hidden, torch.stack([output[0].float() for output in outputs])


def _sinks(hidden: Mapping[int, Tensor], layer_JSD: Tensor) -> Tensor:
    """True for tokens that are a sink for any layer of either model, [S]."""
    position_S = torch.arange(layer_JSD.shape[1], device=layer_JSD.device)
    sink_S = torch.zeros_like(position_S, dtype=torch.bool)
    for features_SD in (*hidden.values(), *layer_JSD):
        sink_S |= sink_mask(features_SD.to(layer_JSD.device), position_S)
    return sink_S


def expert_layer_table(cka_LEJ: Tensor, teacher_layers: list[int], top: int = 8) -> dict[str, Any]:
    """The `top` best-aligned experts of every student layer, JSON-able.

    Args:
        teacher_layers: decoder layer of every position of the first axis.

    Returns:
        {schema, student_layers: {student layer: [{teacher_layer, expert, cka, rank}, ...]}}; rank 1 is the best of all
        experts of the teacher. Experts without evidence (NaN) are left out.
    """
    experts = cka_LEJ.shape[1]
    layers = {}
    for layer, cka_X in enumerate(cka_LEJ.flatten(0, 1).T):  # X = L x E
        order_X = cka_X.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)[:top].tolist()
        rows = [(rank, *divmod(place, experts), float(cka_X[place])) for rank, place in enumerate(order_X, 1)]
        layers[str(layer)] = [
            {"teacher_layer": teacher_layers[position], "expert": expert, "cka": round(cka, 6), "rank": rank}
            for rank, position, expert, cka in rows
            if cka == cka
        ]
    return {"schema": TABLE_SCHEMA, "student_layers": layers}


def write_expert_layer_table(path: Path, teacher: PreTrainedModel, cka_LEJ: Tensor, tokens: int, top: int = 8) -> None:
    """Write the table of `cka_LEJ`, measured on so many tokens, as JSON to `path`."""
    table = expert_layer_table(cka_LEJ, [view.index for view in moe_layers(teacher)], top)
    write_json_atomic(path, table | {"tokens": tokens})
