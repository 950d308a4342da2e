"""Making a model use other experts than its routers choose, and reaching nothing but its routers.

Every router returns (logits, weights, ids), and every experts module takes as many ids per token as it is given. So a
forward hook on the router is all it takes, whatever the family: softmax, softmax over the chosen, sigmoid with a
selection bias, sparsemixer. Limits on groups hold for the model's own top-k alone.

Shape suffixes: T tokens, E experts, K the model's own top-k, N experts in use per token, D model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from moe_edge.families.kernels import ALL_AT_ONCE
from moe_edge.families.views import MoELayerView, moe_layers
from moe_edge.formulas.expert_sampling import spread_weights
from moe_edge.formulas.router_loss import gate_logprobs

# The routers' parameters of every family and no others; selection biases are not trained by gradients.
ROUTER_PATTERN = r"\.(gate|router)\.(wg\.)?(weight|bias)$"

# (decoder layer, gate_TE whose rows sum to one, preference_TE that the top-k goes by) -> ids [T, N]
Choose = Callable[[int, Tensor, Tensor], Tensor]


@contextmanager
def rerouted(model: nn.Module, choose: Choose) -> Iterator[nn.Module]:
    """While open, every MoE layer of `model` uses the experts that `choose` names.

    Their weights are the gate over them (`gate_logprobs`), scaled to the total that the router's own weights have for the
    token; both may be differentiated with respect to the router. Router logits are heard as always.
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
    before = model.config._experts_implementation
    if before is not None and before != ALL_AT_ONCE:
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
    scores_TE = logits_TE.float().sigmoid() if is_sigmoid(view) else logits_TE.float().softmax(dim=-1)
    return scores_TE + bias.tensor.detach().flatten()


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
