"""How far routers have moved from where they were: KL(gate now || gate then) on what the routers are given.

A copy of a router is a few hundred kilobytes and asking it is one small product, so that this is always on.

Shape suffixes: L MoE layers, T tokens, D model, E experts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_edge.formulas.routers import gate_logprobs
from moe_edge.models.routing import is_sigmoid, router_logits, router_tensors
from moe_edge.models.views import moe_layers


class RouterSnapshot:
    """The routers of `model` as they are now; keys are `<decoder layer>.<name below the router>`.

    Raises:
        InputRejected: the model has no routers.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        self._views = moe_layers(model)
        self.parameters = {
            f"{view.index}.{name}": parameter
            for view in self._views
            for name, parameter in router_tensors(view).items()
        }
        self.tensors = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}

    @torch.no_grad()
    def drift(self, inputs: Mapping[int, Tensor]) -> Tensor:
        """Mean KL(now || then) over tokens in nats, of every layer: float32 [L].

        Args:
            inputs: decoder layer -> what its router is given, (T, D).
        """
        kl = []
        for view in self._views:
            then = {name: self.tensors[f"{view.index}.{name}"] for name in router_tensors(view)}
            hidden_TD, sigmoid = inputs[view.index], is_sigmoid(view)
            now = {name: _whole(parameter) for name, parameter in router_tensors(view).items()}
            now_TE = gate_logprobs(router_logits(view, hidden_TD, now)[:, view.real], sigmoid)
            then_TE = gate_logprobs(router_logits(view, hidden_TD, then)[:, view.real], sigmoid)
            kl.append((now_TE.exp() * (now_TE - then_TE)).sum(dim=-1).mean())
        return torch.stack(kl).clamp_min(0)

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the routers of the model what they were."""
        for key, parameter in self.parameters.items():
            parameter.copy_(self.tensors[key])

    @torch.no_grad()
    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Take another snapshot's tensors, as after a resume; the model stays as it is."""
        for key, tensor in self.tensors.items():
            tensor.copy_(tensors[key])


def _whole(parameter: Tensor) -> Tensor:
    """A parameter that FSDP has sharded, from all processes."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
