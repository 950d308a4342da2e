"""What the experts of every layer do to the KL near a choice: one forward and two backward passes per row of text.

A zero is added to every layer's routed output and the gradient is taken with respect to it, so that no weight gets a
gradient. The KL's gradient at the logits is q - p; a label drawn from the student's own q gives one sample of the
curvature. From the experts' outputs on all tokens only inner products are kept (formulas/swaps.py), so memory does not
grow with the width of the model.

Shape suffixes: N rows, S tokens of a row, T tokens of all rows, K top-k, E experts, R gradients, D model, V vocabulary, C
sets.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_edge.contracts.plan import KeptExperts
from moe_edge.formulas.swaps import LayerProducts, Predicted, predict
from moe_edge.models.pruning import mask_router, masked
from moe_edge.models.taps import Outputs, decoder_layers, recorded_outputs
from moe_edge.models.views import MoELayerView, expert_outputs, moe_layers, route
from moe_edge.planning.partial_runs import Meter

CHUNK_SETS = 32
PASSES = 4  # the teacher's forward, the student's, and two backward passes without weight gradients


@dataclass(frozen=True)
class LocalLayer:
    """One MoE layer near the current choice."""

    view: MoELayerView
    hidden_TD: Tensor  # what router and experts read
    products: LayerProducts
    rows: int  # of equal length, whose tokens these are

    @torch.no_grad()
    def predict(self, sets: Sequence[Sequence[int]], top_k: int | None) -> Predicted:
        """What each of the sets would change here if it were kept instead."""
        return self._predict(_mixing_weights(self.view, self.hidden_TD, ids, top_k) for ids in sets)

    @torch.no_grad()
    def promising(
        self, old: Sequence[int], new: Sequence[int], most: int, top_k: int | None
    ) -> tuple[list[int], list[int]]:
        """The `most` experts of `old` that cost least to lose, and those of `new` that help most, without routing again.

        An old one just loses its weight, a new one gets the weight that the teacher's router would give it.
        """
        weight_TE = self.products.weight_TE
        every_TE = _mixing_weights(self.view, self.hidden_TD, range(self.view.count), top_k)
        one_hot_EE = torch.eye(self.view.count, device=weight_TE.device)
        without = self._predict(weight_TE * (1 - one_hot_EE[expert]) for expert in old).gain
        added = self._predict(weight_TE + every_TE * one_hot_EE[expert] for expert in new).gain
        return _best(old, without, most), _best(new, added, most)

    def _predict(self, weights: Iterable[Tensor]) -> Predicted:
        """A few sets at a time, because each has a weight for every token and expert."""
        remaining, parts = iter(weights), []
        while part := list(islice(remaining, CHUNK_SETS)):
            parts.append(predict(self.products, torch.stack(part), self.rows))
        return Predicted(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _best(ids: Sequence[int], gain: Tensor, most: int) -> list[int]:
    return [ids[position] for position in gain.argsort(descending=True, stable=True)[:most].tolist()]


def _mixing_weights(view: MoELayerView, hidden_TD: Tensor, ids: Sequence[int], top_k: int | None) -> Tensor:
    """The weights with which the block would mix its experts if it had only `ids`, by the teacher's ids, [T, E]."""
    with ExitStack() as undo:
        if top_k is not None:
            undo.callback(setattr, view.router, "top_k", view.router.top_k)
            setattr(view.router, "top_k", top_k)  # noqa: B010
        mask_router(view, ids, undo)
        index_TK, weight_TK = route(view, hidden_TD)
    teacher_ids = torch.tensor(ids, device=index_TK.device)
    return _spread(teacher_ids[index_TK], weight_TK, view.count)


def _spread(index_TK: Tensor, weight_TK: Tensor, experts: int) -> Tensor:
    zeros_TE = torch.zeros(len(index_TK), experts, device=index_TK.device)
    return zeros_TE.scatter_(1, index_TK, weight_TK.detach().float())


def local_layers(
    model: PreTrainedModel,
    kept: KeptExperts,
    ids_NS: Tensor,
    *,
    top_k: int | None,
    residual_scale: float,
    generator: torch.Generator,
    meter: Meter,
) -> list[LocalLayer]:
    """The layers of `model` near `kept`, from a few rows; row by row, because a graph of one row is large enough.

    Args:
        residual_scale: the factor with which the model adds a block's output to the residual stream.
        generator: on the CPU; draws the labels of the curvature.
    """
    views = moe_layers(model)
    parts: list[list[tuple[Tensor, LayerProducts]]] = [[] for _ in views]
    with _frozen(model):
        for ids_S in ids_NS.to(model.device):
            meter.add(len(ids_S), PASSES + meter.experts_share)
            row = _Row(model, views, ids_S[None], residual_scale)
            for part, found in zip(parts, row.products(kept, top_k, generator), strict=True):
                part.append(found)
    return [_joined(view, part) for view, part in zip(views, parts, strict=True)]


def _joined(view: MoELayerView, part: list[tuple[Tensor, LayerProducts]]) -> LocalLayer:
    hidden, products = zip(*part, strict=True)
    columns = zip(LayerProducts._fields, zip(*products, strict=True), strict=True)
    joined = {name: torch.cat(column, dim=1 if name == "pull_RTE" else 0) for name, column in columns}
    return LocalLayer(view, torch.cat(hidden), LayerProducts(**joined), len(part))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight asks for a gradient while open."""
    with ExitStack() as undo:
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        yield


class _Row:
    """One row of text, under the teacher and under a choice."""

    def __init__(
        self, model: PreTrainedModel, views: Sequence[MoELayerView], ids_1S: Tensor, residual_scale: float
    ) -> None:
        self.model, self.views, self.ids_1S, self.residual_scale = model, views, ids_1S, residual_scale
        self._calls: dict[int, tuple[Tensor, ...]] = {}  # what each layer's experts were given
        self._zeros: dict[int, Tensor] = {}  # what was added to their output

    def products(
        self, kept: KeptExperts, top_k: int | None, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, LayerProducts]]:
        """(hidden_TD, products) of every layer."""
        teacher, student = Outputs(), Outputs()
        layers = decoder_layers(self.model)
        with torch.no_grad(), recorded_outputs(layers, teacher):
            p_SV = self._logits().softmax(dim=-1)
        with masked(self.model, kept, top_k), recorded_outputs(layers, student), self._probed(), torch.enable_grad():
            logits_SV = self._logits()
        gradients = self._gradients(logits_SV, p_SV, generator)
        for position, view in enumerate(self.views):
            gradient_RSD = torch.stack([each[position] for each in gradients]).float()
            own_SD, teacher_SD = (_tensor(outputs[view.index]).detach()[0].float() for outputs in (student, teacher))
            yield self._layer(view, gradient_RSD, own_SD, teacher_SD)

    def _logits(self) -> Tensor:
        logits_SV: Tensor = self.model(input_ids=self.ids_1S, use_cache=False).logits[0]
        return logits_SV.float()

    @contextmanager
    def _probed(self) -> Iterator[None]:
        """Remember what the experts are given, and add a zero whose gradient can be asked for to what they return."""
        with ExitStack() as undo:
            for view in self.views:

                def before(module: nn.Module, inputs: Any, index: int = view.index) -> None:
                    self._calls[index] = inputs

                def after(module: nn.Module, inputs: Any, output: Tensor, index: int = view.index) -> Tensor:
                    self._zeros[index] = torch.zeros_like(output).requires_grad_()
                    return output + self._zeros[index]

                undo.callback(view.experts.register_forward_pre_hook(before).remove)
                undo.callback(view.experts.register_forward_hook(after).remove)
            yield

    def _gradients(
        self, logits_SV: Tensor, p_SV: Tensor, generator: torch.Generator
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """d KL / dy of every layer, and d log q(drawn label) / dy."""
        zeros = [self._zeros[view.index] for view in self.views]
        q_SV = logits_SV.detach().softmax(dim=-1)
        drawn_S1 = torch.rand(len(q_SV), 1, generator=generator).to(q_SV.device)
        label_S1 = (q_SV.cumsum(dim=-1) < drawn_S1).sum(dim=-1, keepdim=True).clamp(max=q_SV.shape[-1] - 1)
        score_SV = (-q_SV).scatter_add(1, label_S1, torch.ones_like(drawn_S1))
        kl = torch.autograd.grad(logits_SV, zeros, q_SV - p_SV, retain_graph=True)
        return kl, torch.autograd.grad(logits_SV, zeros, score_SV)

    @torch.no_grad()
    def _layer(
        self, view: MoELayerView, gradient_RSD: Tensor, own_SD: Tensor, teacher_SD: Tensor
    ) -> tuple[Tensor, LayerProducts]:
        hidden_SD, index_SK, weight_SK = self._calls[view.index][:3]
        hidden_SD = hidden_SD.detach()
        out_SED = expert_outputs(view, hidden_SD).float().transpose(0, 1)
        added_SED = self.residual_scale * out_SED
        return hidden_SD, LayerProducts(
            weight_TE=_spread(index_SK, weight_SK, view.count),
            pull_RTE=torch.einsum("rtd,ted->rte", gradient_RSD.view(len(gradient_RSD), *hidden_SD.shape), out_SED),
            own_TE=torch.einsum("td,ted->te", own_SD, added_SED),
            teacher_TE=torch.einsum("td,ted->te", teacher_SD, added_SED),
            gram_TEE=added_SED @ added_SED.mT,
            norms_T3=torch.stack([own_SD.square(), own_SD * teacher_SD, teacher_SD.square()], dim=-1).sum(dim=1),
        )


def _tensor(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
