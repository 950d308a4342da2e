"""Every large weight matrix of a loaded model as rows that a quantizer can read and write in place.

What: `weight_rows`: per matrix its bit class (contracts/quantization.py), its layer, a view of the parameter with the
input columns last, and the neutral imatrix name of those columns. Why by walking modules: the classes are coarse
enough that no family needs a row of its own. Norms, routers, gates of one row and convolutions stay as they are, as
they do in the exported file.

Legend: E experts, D model, F expert width, R rows, N weights of a row (n_in).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_edge.families.taps import decoder_layers, dense_taps
from moe_edge.families.views import MoELayerView, moe_layers


@dataclass(frozen=True)
class WeightRows:
    """One parameter; writing to `rows` changes the model."""

    bit_class: str
    layer: int | None  # decoder layer; None: embedding or head
    position: int | None  # place among the MoE layers, the first axis of the statistics; None: not a MoE layer
    rows: Tensor  # [R, N], or [E, R, N] for experts; a view
    imatrix: str | None  # name in Statistics.imatrix; None: unweighted


def weight_rows(model: PreTrainedModel) -> list[WeightRows]:
    """All quantizable matrices: embedding and head (one entry where tied), then layer by layer."""
    views = {view.index: view for view in moe_layers(model)}
    hidden = _matrix(model.get_input_embeddings()).shape[1]
    tapped = {id(tap.module): tap.name for tap in dense_taps(model)}
    found = list(_ends(model))
    for index, layer in enumerate(decoder_layers(model)):
        view = views.get(index)
        feed_forward = _ids(_dense_block(layer)) if view is None else _ids(view.block) | _ids(view.shared)
        routers = _ids(None if view is None else view.router)
        for module in layer.modules():
            if not isinstance(module, nn.Linear) or module.out_features == 1 or id(module) in routers:
                continue
            bit_class = "shared" if id(module) in feed_forward else "attention"
            name = tapped.get(id(module))
            if name is None and module.in_features == hidden:  # reads the same input as a tapped sister
                name = "attention_in" if bit_class == "attention" else "dense_in" if view is None else "ffn_in"
            position = None if view is None else view.position
            found.append(WeightRows(bit_class, index, position, module.weight.data, name))
        if view is not None:
            found += _experts(view)
    return found


def _dense_block(layer: nn.Module) -> nn.Module | None:
    """The feed-forward block of a layer without experts; every token reads it, as it reads shared experts."""
    return getattr(layer, "mlp", None) or getattr(layer, "feed_forward", None)


def _ids(module: nn.Module | None) -> set[int]:
    return set() if module is None else {id(inner) for inner in module.modules()}


def _ends(model: PreTrainedModel) -> Iterator[WeightRows]:
    """The head is measured with its input's importance; a tied embedding is the same tensor."""
    ends: Any = model
    embedding, head = _matrix(ends.get_input_embeddings()), _matrix(ends.get_output_embeddings())
    if embedding.data_ptr() != head.data_ptr():
        yield WeightRows("embedding_head", None, None, embedding, None)
    yield WeightRows("embedding_head", None, None, head, "head_in")


def _matrix(module: Any) -> Tensor:
    """The weight of an embedding or a head."""
    weight: Tensor = module.weight.data
    return weight


def _experts(view: MoELayerView) -> Iterator[WeightRows]:
    for bit_class, name, imatrix in (
        ("expert_gate_up", "gate_up_proj", "expert_in"),
        ("expert_down", "down_proj", "expert_down"),
    ):
        stack = getattr(view.experts, name).data
        rows = stack.transpose(1, 2) if view.experts.is_transposed else stack
        yield WeightRows(bit_class, view.index, view.position, rows, imatrix)
