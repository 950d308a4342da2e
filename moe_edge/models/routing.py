"""The routers of a loaded model: other experts in the place of their choice, their parameters, their near-ties.

`rerouted` makes a model use other experts than its routers choose. Every router returns (logits, weights, ids), and every
experts module takes as many ids per token as it is given. So a forward hook on the router is all it takes, whatever the
family: softmax, softmax over the chosen, sigmoid with a selection bias, sparsemixer. Limits on groups hold for the model's
own top-k alone.

`route_without` says where the tokens of an expert go when it is taken away. It is the router's own code that answers, so
that renormalisation, sigmoids and groups are right for every family. Most routers lose the expert's row, as in
`pruning.masked`. One that splits its rows into equal groups cannot lose a single row; there the expert is made
unselectable through the selection bias.

`routing_gap` is how far every token is from a near-tie: the score of its last chosen expert minus that of the next one.
Where the gap is smaller than a runtime's rounding error, the runtime may rightly choose another expert, and logits can no
longer be compared number by number.

Shape suffixes: T tokens, E experts, K the model's own top-k, N experts in use per token, D model, G groups.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from moe_edge.formulas.routers import gate_logprobs, spread_weights
from moe_edge.models.kernels import ALL_AT_ONCE
from moe_edge.models.pruning import mask_router
from moe_edge.models.views import MoELayerView, config_of, moe_layers, route, router_scores, scores_of

# The routers' parameters of every family and no others; selection biases are not trained by gradients.
ROUTER_PATTERN = r"\.(gate|router)\.(wg\.)?(weight|bias)$"

# (decoder layer, gate_TE whose rows sum to one, preference_TE that the top-k goes by) -> ids [T, N]
Choose = Callable[[int, Tensor, Tensor], Tensor]


@contextmanager
def rerouted(model: nn.Module, choose: Choose) -> Iterator[nn.Module]:
    """While open, every MoE layer of `model` uses the experts that `choose` names.

    Their weights are the gate over them (`gate_logprobs`), scaled to the total that the router's own weights have for the
    token; both may be differentiated with respect to the router. Router logits are what they are without it.
    """
    with ExitStack() as undo:
        for view in moe_layers(model):
            undo.callback(view.router.register_forward_hook(_replace(view, choose)).remove)
        _use_dense_kernel(model, undo)
        yield model


def _replace(view: MoELayerView, choose: Choose) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE, weight_TK, _ = output
        logprob_TE = gate_logprobs(logits_TE, is_sigmoid(view))
        index_TN = choose(view.index, logprob_TE.detach().exp(), preference(view, logits_TE.detach()))
        weight_TN = spread_weights(logprob_TE, index_TN, weight_TK.sum(dim=-1).to(logprob_TE.dtype))
        return logits_TE, weight_TN.to(weight_TK.dtype), index_TN

    return hook


def _use_dense_kernel(model: nn.Module, undo: ExitStack) -> None:
    """Nearly every expert sees nearly every token, so that on a CPU two large products beat a loop over experts."""
    if next(model.parameters()).device.type != "cpu":
        return
    before = config_of(model)._experts_implementation
    if before is not None and before != ALL_AT_ONCE:
        assert isinstance(model, PreTrainedModel)
        model.set_experts_implementation(ALL_AT_ONCE)
        undo.callback(model.set_experts_implementation, before)


def is_sigmoid(view: MoELayerView) -> bool:
    """Are the layer's gates sigmoids?"""
    return view.family.gating == "sigmoid"


def preference(view: MoELayerView, logits_TE: Tensor) -> Tensor:
    """What the layer's own top-k goes by, groups aside: its scores and the selection bias, where there is one. [T, E]."""
    bias = view.selection_bias
    if bias is None:
        return logits_TE
    return scores_of(view, logits_TE) + bias.tensor.detach().flatten()


def router_tensors(view: MoELayerView) -> dict[str, nn.Parameter]:
    """{name below the router: parameter} of one layer, without the selection bias."""
    names = (view.names.weight, *(("bias",) if view.family.router_bias else ()))
    return {name: view.router.get_parameter(name) for name in names}


def router_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name in the model: parameter} of all routers, in the model's order."""
    wanted = {id(tensor) for view in moe_layers(model) for tensor in router_tensors(view).values()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}


def router_logits(view: MoELayerView, hidden_TD: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
    """Logits (T, E) of a layer's router, float32: a linear map in every family.

    Args:
        tensors: other tensors in the place of the router's, named as in `router_tensors`.
    """
    given = router_tensors(view) if tensors is None else tensors
    bias_E = given["bias"].float() if view.family.router_bias else None
    return functional.linear(hidden_TD.float(), given[view.names.weight].float(), bias_E)


@torch.no_grad()
def routing_gap(view: MoELayerView, hidden_TD: Tensor) -> Tensor:
    """Lowest chosen minus highest other score of each token, (T,); infinite where all experts are chosen.

    In units of what the router sorts by: logits, or scores with the selection bias where the model has one. Of experts
    in groups, only those of a chosen expert's group count as others; a tie between groups is not seen.
    """
    index_TK, _ = route(view, hidden_TD)
    scores_TE = router_scores(view, hidden_TD)
    bias = view.selection_bias
    scores_TE = scores_TE.log() if bias is None else scores_TE + bias.tensor.reshape(-1).float()
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, index_TK, True)
    searched_TGE = chosen_TE.reshape(len(chosen_TE), view.groups[0], -1)
    searched_TE = searched_TGE.any(-1, keepdim=True).expand_as(searched_TGE).flatten(1)
    others_TE = scores_TE.masked_fill(chosen_TE | ~searched_TE, -torch.inf)
    return scores_TE.masked_fill(~chosen_TE, torch.inf).amin(1) - others_TE.amax(1)


@contextmanager
def watched_gaps(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside the block every forward pass appends one gap tensor (T,) per MoE layer to the yielded list."""
    gaps: list[Tensor] = []
    with ExitStack() as undo:
        for view in moe_layers(model):

            def watch(module: nn.Module, inputs: tuple[Tensor, ...], view: MoELayerView = view) -> None:
                hidden = inputs[0]
                gaps.append(routing_gap(view, hidden.reshape(-1, hidden.shape[-1])))

            undo.callback(view.experts.register_forward_pre_hook(watch).remove)
        yield gaps


def can_reroute(view: MoELayerView) -> bool:
    """Is there an expert to take the place of a removed one, and a way to ask for it?"""
    return view.count > view.top_k and (view.groups[0] == 1 or view.selection_bias is not None)


@torch.no_grad()
def route_without(view: MoELayerView, hidden_TD: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """(index_TK, weight_TK) that the block would hand to its experts if `expert` were not there; ids as always."""
    bias = view.selection_bias
    if view.groups[0] > 1 and bias is not None:
        row = bias.tensor.select(bias.axis, expert)
        kept = row.clone()
        try:
            row.fill_(-torch.inf)
            return route(view, hidden_TD)
        finally:
            row.copy_(kept)
    with ExitStack() as undo:
        mask_router(view, [other for other in range(view.count) if other != expert], undo)
        index_TK, weight_TK = route(view, hidden_TD)
        return index_TK + (index_TK >= expert), weight_TK
