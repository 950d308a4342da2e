"""Dense students: which dense class of transformers has exactly the attention and norms of an MoE family, and building it.

Where no class fits (OLMoE normalises before its blocks, Olmo2 behind them; others have attention of their own), the
student is stored in its own family with one expert, whose gate is a constant: the same function, in a class that every
tool knows already.

Legend: T tokens, D model, F width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_edge.formulas.ffn import Ffn, concatenate
from moe_edge.models.pruning import check_kept, prune
from moe_edge.models.views import MoELayerView, moe_layers, shared_matrices
from moe_edge.models.weights import check_width, replace_experts, write_width

DENSE_OF = {"qwen3_moe": "qwen3", "qwen2_moe": "qwen2", "mixtral": "mistral", "granitemoe": "granite"}
DENSE_TYPES = (*DENSE_OF.values(), "llama")  # what is loaded as a dense student; llama comes from elsewhere
_OWN_KEYS = ("model_type", "architectures", "intermediate_size", "transformers_version", "max_window_layers")


def dense_type(model: PreTrainedModel) -> str | None:
    """The model_type of the dense class with this model's attention and norms, or None."""
    return DENSE_OF.get(model.config.model_type)


def shared_network(view: MoELayerView) -> Ffn | None:
    """The expert that every token passes, or None."""
    return None if view.shared is None else Ffn(*shared_matrices(view))


@torch.no_grad()
def shared_gate(view: MoELayerView, hidden_TD: Tensor) -> Tensor:
    """What the shared expert's output is multiplied with, [T, 1]; ones where nothing gates it."""
    gate = getattr(view.block, "shared_expert_gate", None)
    return hidden_TD.new_ones(len(hidden_TD), 1) if gate is None else functional.sigmoid(gate(hidden_TD))


@torch.no_grad()
def build_dense(model: PreTrainedModel, networks: Sequence[Ffn]) -> PreTrainedModel:
    """The dense model of `dense_type` with one network per layer; everything else is copied by name.

    Raises:
        KeyError: the family has no dense class.
    """
    kind = DENSE_OF[model.config.model_type]
    values = _dense_values(model, kind) | {"intermediate_size": networks[0].gate_FD.shape[0]}
    config = CONFIG_MAPPING[kind](**values)
    dense: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=model.dtype)  # type: ignore[no-untyped-call]
    ours, theirs = dense.state_dict(), model.state_dict()
    for index, network in enumerate(networks):
        names = (f"model.layers.{index}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        theirs |= dict(zip(names, network[:3], strict=True))
    for name, tensor in ours.items():
        if name in theirs:
            tensor.copy_(theirs[name])
        else:
            tensor.zero_()  # a bias that the dense class always has
    dense.generation_config = model.generation_config
    dense.eval()  # type: ignore[no-untyped-call]
    return dense


def _dense_values(model: PreTrainedModel, kind: str) -> dict[str, Any]:
    """The teacher's configuration, as far as the dense class has the same keys."""
    given = model.config.to_dict()
    known = set(CONFIG_MAPPING[kind]().to_dict()) | {"head_dim"}
    values = {key: value for key, value in given.items() if key in known and key not in _OWN_KEYS}
    if "layer_types" in known:
        windowed = bool(given.get("use_sliding_window") and given.get("sliding_window"))
        kinds = ["sliding_attention" if windowed else "full_attention"] * given["num_hidden_layers"]
        values["layer_types"] = given.get("layer_types") or kinds
    return values


def check_single_expert(model: PreTrainedModel, width: int) -> None:
    """Can the model have one expert of this width in every layer?

    Raises:
        ConfigError: its router cannot do with one expert (groups of experts).
        InputRejected: other tensors would change with the width.
    """
    check_kept(model, {view.index: [0] for view in moe_layers(model)}, 1)
    check_width(model, width)


@torch.no_grad()
def build_single_expert(
    model: PreTrainedModel, networks: Sequence[Ffn], weigh: Callable[[MoELayerView], float]
) -> PreTrainedModel:
    """`model` with one expert per layer, whose weight is a constant; changed in place.

    Args:
        weigh: the weight that a block hands to its only expert, once its router is all zero.
    """
    prune(model, {view.index: [0] for view in moe_layers(model)}, top_k=1)
    for view, network in zip(moe_layers(model), networks, strict=True):
        for parameter in view.router.parameters():
            nn.init.zeros_(parameter)
        replace_experts(view, [concatenate([network], [1 / weigh(view)])])
    write_width(model, networks[0].gate_FD.shape[0])
    return model
