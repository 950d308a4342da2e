"""Resolves a stage's `layer_map`: which teacher layer every student layer is compared with.

A pruned student has the teacher's layers, so `identity` is the default and an error where the depths differ.
`proportional` needs no data. `auto` measures debiased CKA between all pairs of layers on a few rows and takes the map that
never steps back and has the largest sum (formulas/matching.py).

Shape suffixes: N rows, S tokens of a row, J layers of the student, L layers of the teacher.
"""

import logging

from torch import Tensor, nn

from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.alignment import layer_cka_matrix
from moe_edge.formulas.matching import best_monotone_map, proportional_map
from moe_edge.models.taps import decoder_layers

log = logging.getLogger(__name__)
MAP_ROWS = 4  # 2,048 tokens at the default length: the debiased estimate is steady to the second decimal


def resolve_layer_map(kind: str, student: nn.Module, teacher: nn.Module, ids_NS: Tensor | None) -> dict[int, int]:
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
