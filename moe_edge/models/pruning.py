"""Dropping experts and neurons of a loaded model: masked for a while without touching them, or pruned for good.

`masked` and `prune` give the same logits, because both let the router see only the kept rows: gates, groups, top-k and
renormalisation then happen over the kept experts exactly as in the pruned model. `masked` copies a few router rows and no
expert, so that a plan can try many choices.

`masked_neurons` tries narrower experts. A neuron's whole contribution is its activation times its column of the down
projection, so a zero column is an absent neuron. The masked copy of a layer's down projections lives only while that
layer runs, so that trying a width costs the memory of one layer; the model's own tensors are never written.

Legend: E experts, K top-k, D model, F expert width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_edge.contracts.capabilities import unpaddable
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.plan import KeptExperts
from moe_edge.contracts.spec import places
from moe_edge.families import family_of
from moe_edge.models.padding import check_padding, is_padded, pad_layer, write_real_counts
from moe_edge.models.views import ExpertAxis, MoELayerView, config_of, moe_layers

NeuronMask = Callable[[MoELayerView], Tensor]  # a layer -> which neurons of its experts stay [E, F] bool


def check_kept(model: nn.Module, kept: KeptExperts, top_k: int | None = None, *, uniform: bool = True) -> None:
    """Refuse an impossible choice before any work.

    Args:
        kept: decoder layer -> kept expert ids, ascending; a layer that is absent keeps all.
        uniform: must every layer keep the same number (what one config.json can say without padding)?

    Raises:
        ConfigError: unknown layer, ids out of range or not ascending, groups that keep different numbers, top-k above
            the experts that a token can reach, uneven counts, a model with padding already.
    """
    views = {view.index: view for view in moe_layers(model)}
    if is_padded(model) and any(len(kept.get(layer, ())) not in (0, view.count) for layer, view in views.items()):
        raise _bad(
            "experts of a student with padded layers cannot be dropped", "its layers have different numbers of them"
        )
    unknown = sorted(set(kept) - set(views))
    if unknown:
        raise _bad(f"there is no MoE layer {unknown[0]}", f"the MoE layers are {', '.join(map(str, views))}")
    for layer, view in views.items():
        ids = view.real if is_padded(model) else list(kept.get(layer, range(view.count)))
        _check_layer(view, ids, view.top_k if top_k is None else top_k)
    counts = {len(kept.get(layer, range(view.count))) for layer, view in views.items()}
    if uniform and len(counts) > 1:
        raise _bad("every layer must keep the same number of experts", f"found {sorted(counts)}")


def _check_layer(view: MoELayerView, ids: list[int], top_k: int) -> None:
    if not ids or sorted(set(ids)) != ids or ids[0] < 0 or ids[-1] >= view.count:
        raise _bad(f"layer {view.index}: kept experts must be ascending ids in 0..{view.count - 1}", f"got {ids}")
    if not 1 <= top_k <= len(ids):
        why = f"each token needs {top_k} experts, only {len(ids)} are kept"
        raise _bad(f"layer {view.index}: top-k {top_k} exceeds the kept experts", why)
    if view.family.fixed_top_k not in (None, top_k):
        why = f"the router of {view.family.model_type} computes top-k {view.family.fixed_top_k} only"
        raise _bad(f"layer {view.index}: top-k cannot be {top_k}", why)
    _check_groups(view, ids, top_k)


def _check_groups(view: MoELayerView, ids: list[int], top_k: int) -> None:
    """The router splits its rows into equal contiguous groups, and searches only some of them."""
    groups, used = view.groups
    size = view.count // groups
    per_group = [sum(group * size <= expert < (group + 1) * size for expert in ids) for group in range(groups)]
    where = f"layer {view.index}"
    if len(set(per_group)) > 1:
        why = f"its router splits the experts into {groups} groups of {size}; kept per group: {per_group}"
        raise _bad(f"{where}: every group must keep the same number of experts", why)
    fewest = view.family.fewest_per_group
    if per_group[0] < fewest:
        why = f"a group is scored by its best {fewest} experts, only {per_group[0]} are kept"
        raise _bad(f"{where}: too few experts in each of {groups} groups", why)
    if top_k > used * per_group[0]:
        why = f"a token searches {used} of {groups} groups, that is {used * per_group[0]} kept experts"
        raise _bad(f"{where}: top-k {top_k} exceeds the reachable experts", why)


def _bad(what: str, why: str) -> ConfigError:
    return ConfigError(what, where="plan: kept, top_k", why=why, next_command="set plan.experts and plan.top_k to fit")


@contextmanager
def masked(model: nn.Module, kept: KeptExperts, top_k: int | None = None) -> Iterator[nn.Module]:
    """While open, `model` routes as if pruned to `kept` (and to `top_k`, where given); experts are not copied.

    Observers with a pre-hook on `experts` still see the teacher's expert ids. The model is as before on exit,
    also after an error.

    Raises:
        ConfigError: see `check_kept`; counts may differ between layers here.
    """
    check_kept(model, kept, top_k, uniform=False)
    views = moe_layers(model)
    with ExitStack() as undo:
        for view in views:
            ids = kept.get(view.index)
            if ids is not None and len(ids) < view.count:
                _mask_layer(view, ids, undo)
            if top_k is not None:
                _swap(view.router, "top_k", top_k, undo)
        counts = {len(kept.get(view.index, range(view.count))) for view in views}
        if len(counts) == 1:  # the balance loss of transformers reads these two
            _swap(model, "num_experts", counts.pop(), undo)
        if top_k is not None:
            _swap(model, "num_experts_per_tok", top_k, undo)
        yield model


def mask_router(view: MoELayerView, ids: Sequence[int], undo: ExitStack) -> None:
    """Until `undo` closes, the router knows only the given experts and counts them from 0."""
    for found in view.router_axes():
        _swap(found.owner, found.name, _selected(found, ids), undo)
    _swap(view.router, "num_experts", len(ids), undo)


def _mask_layer(view: MoELayerView, ids: Sequence[int], undo: ExitStack) -> None:
    mask_router(view, ids, undo)
    rows = torch.tensor(ids, device=view.router_weight.tensor.device)
    hook = view.experts.register_forward_pre_hook(_to_teacher_ids(rows), prepend=True)
    undo.callback(hook.remove)


def _to_teacher_ids(rows: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def remap(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_TD, index_TK, *rest = inputs
        return (hidden_TD, rows[index_TK], *rest)

    return remap


def _swap(owner: nn.Module, name: str, value: Any, undo: ExitStack) -> None:
    """Set an attribute that is there until `undo` closes."""
    if hasattr(owner, name):
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)


def _selected(found: ExpertAxis, ids: Sequence[int]) -> Tensor:
    """The slices of some experts, as the kind of tensor that the module has."""
    old = found.tensor
    chosen = torch.tensor(ids, device=old.device)
    new = old.detach().index_select(found.axis, chosen)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


@torch.no_grad()
def prune(model: nn.Module, kept: KeptExperts, top_k: int | None = None, *, uneven: bool = False) -> None:
    """Drop every expert that is not in `kept`, in place; router rows, biases, counts and config follow.

    Keeping all experts changes no bit. Parameters are replaced, so an optimizer must be built afterwards.

    Args:
        uneven: may layers keep different numbers? Smaller ones are then padded to the largest (padding.py).

    Raises:
        ConfigError: see `check_kept`; uneven layers of a model that cannot be padded; nothing has been changed then.
    """
    check_kept(model, kept, top_k, uniform=not uneven)
    views = moe_layers(model)
    counts = [len(kept.get(view.index, range(view.count))) for view in views]
    padding = len(set(counts)) > 1
    config = config_of(model)
    if padding and (why := unpaddable(family_of(config.to_dict()).spec(config.to_dict()))):
        raise _bad("layers of this model cannot keep different numbers of experts", why)
    for view in views:
        ids = list(kept.get(view.index, range(view.count)))
        if len(ids) < view.count:
            _drop(view, ids)
        if padding:
            pad_layer(view, places(len(ids), max(counts), view.groups[0]), max(counts))
            _count(view, max(counts))
        if top_k is not None:
            for module in (view.router, view.block):
                _set_present(module, "top_k", top_k)
    _write_counts(model, views[0], top_k)
    if padding:
        write_real_counts(config, counts)


@torch.no_grad()
def without_padding(model: nn.Module) -> None:
    """Take the padding experts out of a loaded model's layers, which then differ in size: for exporters that can say so.

    Raises:
        InputRejected: what config.json calls padding is none; see `check_padding`.
    """
    check_padding(model)
    for view in moe_layers(model):
        if len(view.real) < view.count:
            _drop(view, view.real)


def _drop(view: MoELayerView, ids: Sequence[int]) -> None:
    for found in list(view.expert_axes()):
        setattr(found.owner, found.name, _selected(found, ids))
    _count(view, len(ids))


def _count(view: MoELayerView, experts: int) -> None:
    for found in view.router_axes():
        _set_present(found.owner, "out_features", experts)
    for module in (view.router, view.block, view.experts):
        _set_present(module, "num_experts", experts)


def _set_present(owner: Any, name: str, value: Any) -> None:
    if hasattr(owner, name):
        setattr(owner, name, value)


def _write_counts(model: nn.Module, view: MoELayerView, top_k: int | None) -> None:
    """The numbers that the model and its config keep besides the tensors; the config may carry any or all of the keys."""
    config = config_of(model)
    for key in ("num_experts", *view.family.expert_keys):
        _set_present(config, key, view.count)
    _set_present(model, "num_experts", view.count)
    if top_k is None:
        return
    for key in view.family.top_k_keys:
        if hasattr(config, key):
            per_layer = isinstance(getattr(config, key), list)
            setattr(config, key, [top_k] * config.num_hidden_layers if per_layer else top_k)
    _set_present(model, "num_experts_per_tok", top_k)


@contextmanager
def masked_neurons(model: nn.Module, mask: NeuronMask) -> Iterator[nn.Module]:
    """While open, only the neurons of `mask` put anything out; the model is as before on exit, also after an error.

    Composes with `masked`: the mask speaks of the teacher's experts.

    Args:
        mask: asked once per layer and forward pass, while the layer's weights are in memory.
    """
    with ExitStack() as undo:
        for view in moe_layers(model):
            _mask_neurons(view, mask, undo)
        yield model


def _mask_neurons(view: MoELayerView, mask: NeuronMask, undo: ExitStack) -> None:
    experts = view.experts
    own: list[nn.Parameter] = []

    def before(_module: nn.Module, _inputs: Any) -> None:
        down = experts.down_proj
        mask_EF = mask(view).to(down.device)
        columns = mask_EF.unsqueeze(-1 if getattr(experts, "is_transposed", False) else 1)
        own.append(down)
        experts.down_proj = nn.Parameter(down.detach() * columns, requires_grad=False)

    def after(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        if own:
            experts.down_proj = own.pop()

    undo.callback(experts.register_forward_pre_hook(before).remove)
    undo.callback(experts.register_forward_hook(after, always_call=True).remove)
