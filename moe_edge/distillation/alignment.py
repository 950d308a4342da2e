"""Alignment of the student's layers with the teacher's by debiased linear CKA: the loss, and the report of both ends.

CKA needs the teacher's hidden states, which the logit cache does not hold, so the live teacher runs, without
gradients. It is made cheap and stays an unbiased sample: of every optimizer step one micro-batch is aligned, in the
layers at one and two thirds of the depth, and the teacher's layers above the deeper one are dropped before it ever
runs. The teacher is loaded only when a stage gives CKA a weight. Nothing is projected or added to the student.

CKA sees features up to rotation and scale: it pulls the geometry of the layers together, not the numbers.

Shape suffixes: L layers, S tokens of a row, D model, B rows.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_edge.contracts.progress import track
from moe_edge.families.loading import load_model
from moe_edge.families.taps import body, decoder_layers
from moe_edge.formulas.cka_loss import cka_pair, hsic_triple, kept_tokens

LAYER_SHARES = (1 / 3, 2 / 3)  # of the depth: where the loss compares teacher and student


def aligned_layers(layers: int) -> list[int]:
    """Indices of the layers in which the loss compares, ascending and distinct."""
    return sorted({min(layers - 1, max(0, round(share * layers) - 1)) for share in LAYER_SHARES})


@contextmanager
def listening(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While open, every forward leaves the outputs [B, S, D] of `layers` in the dictionary."""
    heard: dict[int, Tensor] = {}

    def listener(layer: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            heard[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    with ExitStack() as stack:
        for layer in layers:
            handle = decoder_layers(model)[layer].register_forward_hook(listener(layer))
            stack.callback(handle.remove)
        yield heard


class TeacherLayers:
    """The teacher up to the deepest aligned layer, for the loss.

    Args:
        path: the teacher's folder.
        layers: which layers are compared; those above the last are dropped.
        device: where the student trains.
    """

    def __init__(self, path: Path, layers: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        self.layers = list(layers)
        self._body = body(load_model(path, dtype=dtype)).requires_grad_(False)
        del self._body.layers[max(layers) + 1 :]
        gc.collect()
        self._body.to(device)

    @torch.no_grad()
    def features(self, ids_BS: Tensor) -> dict[int, Tensor]:
        """{layer: its output [B, S, D]}."""
        with listening(_Wrapped(self._body), self.layers) as heard:
            self._body(input_ids=ids_BS, use_cache=False)
        return heard


class _Wrapped(nn.Module):
    """A body that looks like a whole model to families.taps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = inner


def alignment_loss(student: dict[int, Tensor], teacher: dict[int, Tensor]) -> Tensor:
    """Mean over layers and rows of 1 - CKA; the teacher's sink tokens are left out of both sides."""
    terms = []
    for layer, teacher_BSD in teacher.items():
        for teacher_SD, student_SD in zip(teacher_BSD, student[layer], strict=True):
            keep = kept_tokens(teacher_SD)
            terms.append(1 - cka_pair(student_SD[keep], teacher_SD[keep]))
    return torch.stack(terms).mean()


@torch.no_grad()
def layer_cka(student: nn.Module, teacher: nn.Module, ids_NS: np.ndarray) -> list[float]:
    """Debiased CKA between teacher and student for every layer: sums over rows, divided once (Nguyen et al. 2021)."""
    layers = range(len(decoder_layers(teacher)))
    sums_L3 = torch.zeros(len(layers), 3, dtype=torch.float64)
    for ids_S in track(ids_NS, "distill: CKA to the teacher"):
        device = next(student.parameters()).device
        ids_1S = torch.from_numpy(ids_S).long()[None].to(device)
        with listening(teacher, layers) as theirs, listening(student, layers) as ours:
            body(teacher)(input_ids=ids_1S, use_cache=False)
            body(student)(input_ids=ids_1S, use_cache=False)
        for layer in layers:
            keep = kept_tokens(theirs[layer][0])
            parts = hsic_triple(ours[layer][0][keep], theirs[layer][0][keep])
            sums_L3[layer] += torch.stack(parts).double().cpu() / (len(keep) * (len(keep) - 3))
    cross_L, ours_L, theirs_L = sums_L3.unbind(-1)
    return (cross_L / torch.sqrt((ours_L * theirs_L).clamp_min(1e-30))).tolist()
