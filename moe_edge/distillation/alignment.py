"""Layers of the student beside layers of the teacher: which belong together, and how far they see the text alike.

Debiased linear CKA of layer outputs is measured for the report of both ends of a training, and for the layer map `auto`; the
losses on the same features are in feature_terms.py. Sums over rows, divided once (Nguyen et al. 2021); the teacher's sink
tokens are left out.

A pruned student has the teacher's layers, so the layer map is `identity`, and an error where the depths differ.
`proportional` needs no data. `auto` measures CKA between all pairs of layers on a few rows and takes the map that never
steps back and has the largest sum (formulas/matching.py).

Shape suffixes: N rows, S tokens of a row, J layers of the student, L layers of the teacher, T tokens, D model.
"""

import logging
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from moe_edge.contracts.errors import ConfigError
from moe_edge.formulas.cka import cka_across, gram, hsic_across, normalise_rows
from moe_edge.formulas.cka_loss import MIN_TOKENS, hsic_triple, kept_tokens, usable_tokens
from moe_edge.formulas.matching import best_monotone_map, proportional_map
from moe_edge.models.taps import body, decoder_layers, recorded_activations
from moe_edge.process.progress import track

log = logging.getLogger(__name__)
LAYER_SHARES = (1 / 3, 2 / 3)  # of the depth: where losses compare teacher and student
MAP_ROWS = 4  # 2,048 tokens at the default length: the debiased estimate is steady to the second decimal


def aligned_layers(layers: int) -> list[int]:
    """Indices of the layers in which losses compare, ascending and distinct."""
    return sorted({min(layers - 1, max(0, round(share * layers) - 1)) for share in LAYER_SHARES})


def resolve_layer_map(
    kind: str, student: nn.Module, teacher: nn.Module, ids_NS: Tensor | None = None
) -> dict[int, int]:
    """{student layer: teacher layer} of a map named as in the configuration.

    Args:
        ids_NS: rows of text; `auto` reads the first few of them.

    Raises:
        ConfigError: the depths differ and the map is the identity.
        ValueError: `auto` without rows.
    """
    ours, theirs = len(decoder_layers(student)), len(decoder_layers(teacher))
    if kind == "identity":
        if ours != theirs:
            why = f"the student has {ours} layers, the teacher {theirs}; use proportional or auto"
            raise ConfigError("layer_map 'identity' needs equal depth", where="distill.stages: layer_map", why=why)
        return {layer: layer for layer in range(ours)}
    if kind == "proportional":
        return dict(enumerate(proportional_map(ours, theirs)))
    if ids_NS is None:
        raise ValueError("layer_map 'auto' needs rows of text to measure on")
    layers = best_monotone_map(layer_cka_matrix(student, teacher, ids_NS[:MAP_ROWS]))
    log.info("distill: teacher layer of every student layer by CKA: %s", layers)
    return dict(enumerate(layers))


@torch.no_grad()
def layer_cka(
    student: nn.Module, teacher: nn.Module, ids_NS: np.ndarray, layer_map: Mapping[int, int] | None = None
) -> list[float]:
    """Debiased CKA of every student layer with the teacher's layer that `layer_map` gives it; None: the same one."""
    pairs = layer_map or {layer: layer for layer in range(len(decoder_layers(student)))}
    sums_J3 = torch.zeros(len(pairs), 3, dtype=torch.float64)
    for ours, theirs in _outputs(student, teacher, torch.from_numpy(ids_NS), "distill: CKA to the teacher"):
        for sums_3, (layer, other) in zip(sums_J3, pairs.items(), strict=True):
            keep_T = kept_tokens(theirs[other])
            if len(keep_T) >= MIN_TOKENS:
                parts = hsic_triple(ours[layer][keep_T], theirs[other][keep_T])
                sums_3 += torch.stack(parts).double().cpu() / (len(keep_T) * (len(keep_T) - 3))
    cross_J, ours_J, theirs_J = sums_J3.unbind(-1)
    return (cross_J / torch.sqrt((ours_J * theirs_J).clamp_min(1e-30))).tolist()


@torch.no_grad()
def layer_cka_matrix(student: nn.Module, teacher: nn.Module, ids_NS: Tensor) -> Tensor:
    """Debiased CKA of every student layer with every teacher layer, [J, L] float64; NaN where there is no evidence.

    All pairs are judged on the same tokens: those that are a sink for no layer of the teacher.
    """
    total: list[Tensor] | None = None
    for ours, theirs in _outputs(student, teacher, ids_NS, "distill: layer map"):
        usable_S = torch.stack([usable_tokens(theirs[layer]) for layer in sorted(theirs)]).all(dim=0)
        grams = (
            torch.stack([gram(normalise_rows(side[layer][usable_S])) for layer in sorted(side)])
            for side in (ours, theirs)
        )
        parts = [part.cpu() for part in hsic_across(*grams)]
        total = parts if total is None else [old + new for old, new in zip(total, parts, strict=True)]
    assert total is not None
    return cka_across(*total)


def _outputs(
    student: nn.Module, teacher: nn.Module, ids_NS: Tensor, title: str
) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """(student layers' outputs, teacher layers' outputs), each {layer: [S, D]}, row by row."""
    device = next(student.parameters()).device
    models = [(model, range(len(decoder_layers(model)))) for model in (student, teacher)]
    for ids_S in track(ids_NS, title):
        ids_1S = ids_S.long()[None].to(device)
        outputs = []
        for model, layers in models:
            with recorded_activations(model, layers) as activations:
                body(model)(input_ids=ids_1S, use_cache=False)
            outputs.append({layer: output[0] for layer, output in activations.layers.items()})
        yield outputs[0], outputs[1]
