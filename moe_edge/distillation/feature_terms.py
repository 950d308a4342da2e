"""Losses between the outputs of student and teacher layers.

Two layers are compared, at one and two thirds of the depth, and of every optimizer step one micro-batch: an unbiased sample
of a loss whose price is a pass of the live teacher. Nothing is projected, so nothing is added to the student: CKA and
Procrustes take features of any width, the others need the teacher's.

| loss       | blind to                          | where it fits                                           |
|------------|-----------------------------------|---------------------------------------------------------|
| cka        | rotation and scale                | any student; pulls the geometry together                |
| procrustes | one rotation and scale            | any student; fixes the shape as well                    |
| cosine     | the length of every token         | a pruned student: its head expects the teacher's basis  |
| mse        | nothing (as a share of the energy) | the same; norms count as well                          |

Shape suffixes: B rows, S tokens of a row, T tokens, D model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.alignment import aligned_layers
from moe_edge.distillation.terms import MicroBatch, Needs, Term, TermContext
from moe_edge.formulas.cka_loss import MIN_TOKENS, kept_tokens
from moe_edge.formulas.feature_loss import cka_distance, cosine_distance, procrustes_distance, relative_mse
from moe_edge.models.taps import decoder_layers, recorded_activations, width

SVD_TOKENS = 256  # the singular values of 512 tokens take seven times as long
Distance = Callable[[Tensor, Tensor], Tensor]  # (student_TD, teacher_TD) -> scalar, 0 where they agree


class FeatureTerm:
    """A distance between layer outputs, averaged over layers and rows.

    Position 0, the teacher's sink tokens and padding are left out of both sides; a row with fewer than four tokens left
    says nothing.

    Args:
        layers: student layer -> teacher layer.
        most: tokens of a row that are compared, evenly spread; None: all.
    """

    sampled = True

    def __init__(self, name: str, distance: Distance, layers: Mapping[int, int], most: int | None = None) -> None:
        self.name, self._distance, self.layers, self._most = name, distance, dict(layers), most
        self.needs = Needs(layers=frozenset(self.layers.values()))
        self._activations: dict[int, Tensor] = {}

    @contextmanager
    def recording(self, student: nn.Module) -> Iterator[None]:
        """While open, a forward pass of the student leaves the outputs of its layers here."""
        with recorded_activations(student, self.layers) as activations:
            self._activations = activations.layers
            yield

    def loss(self, batch: MicroBatch) -> Tensor:
        """Mean distance of the micro-batch that was just run."""
        values = [
            value
            for ours, theirs in self.layers.items()
            for value in self._rows(self._activations[ours], batch.teacher.layers[theirs], batch.valid_BS)
        ]
        first_BSD, self._activations = next(iter(self._activations.values())), {}
        return torch.stack(values).mean() if values else 0.0 * first_BSD.float().sum()

    def _rows(self, student_BSD: Tensor, teacher_BSD: Tensor, valid_BS: Tensor) -> Iterator[Tensor]:
        for student_SD, teacher_SD, valid_S in zip(student_BSD, teacher_BSD, valid_BS, strict=True):
            keep_T = spread(kept_tokens(teacher_SD, valid_S), self._most)
            if len(keep_T) >= MIN_TOKENS:
                yield self._distance(student_SD[keep_T], teacher_SD[keep_T])


def spread(index_N: Tensor, most: int | None) -> Tensor:
    """At most `most` of the indices, evenly spread from the first to the last."""
    if most is None or len(index_N) <= most:
        return index_N
    return index_N[torch.linspace(0, len(index_N) - 1, most, device=index_N.device).round().long()]


def feature_term(
    name: str, distance: Distance, context: TermContext, *, any_width: bool, most: int | None = None
) -> FeatureTerm:
    """The term on the aligned layers of the student.

    Args:
        any_width: may the student be narrower than the teacher?
        most: as in `FeatureTerm`.

    Raises:
        ConfigError: the widths differ and must not, or the layer map does not fit.
    """
    student, teacher = context.student, context.teacher
    assert teacher is not None
    if not any_width and width(student) != width(teacher):
        why = f"the student is {width(student)} wide, the teacher {width(teacher)}; cka and procrustes take both"
        raise ConfigError(f"the loss '{name}' needs equal widths", where="distill.stages: losses", why=why)
    layers = aligned_layers(len(decoder_layers(student)))
    return FeatureTerm(name, distance, {layer: context.layer_map[layer] for layer in layers}, most)


FEATURE_TERMS: dict[str, Callable[[TermContext], Term]] = {
    "cka": partial(feature_term, "cka", cka_distance, any_width=True),
    "mse": partial(feature_term, "mse", relative_mse, any_width=False),
    "cosine": partial(feature_term, "cosine", cosine_distance, any_width=False),
    "procrustes": partial(feature_term, "procrustes", procrustes_distance, any_width=True, most=SVD_TOKENS),
}
