"""Dropping experts of a loaded model: `masked` for a while without touching them, `prune` for good.

Both give the same logits, because both let the router see only the kept rows: softmax, top-k and renormalisation then
happen over the kept experts exactly as in the pruned model. `masked` copies a few router rows and no expert, so that a
plan can try many choices.

Legend: E experts, K top-k, D model, F expert width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_edge.contracts.errors import ConfigError
from moe_edge.families.base import EXPERT_COUNT_KEYS
from moe_edge.families.views import MoELayerView, moe_layers

Kept = Mapping[int, Sequence[int]]


def check_kept(model: nn.Module, kept: Kept, top_k: int | None = None, *, uniform: bool = True) -> None:
    """Refuse an impossible choice before any work.

    Args:
        kept: layer -> kept expert ids, ascending; a layer that is absent keeps all.
        uniform: must every layer keep the same number (what one config.json can say)?

    Raises:
        ConfigError: unknown layer, ids out of range or not ascending, top-k above the kept experts, uneven counts.
    """
    views = {view.index: view for view in moe_layers(model)}
    unknown = sorted(set(kept) - set(views))
    if unknown:
        raise _bad(f"there is no MoE layer {unknown[0]}", f"the model has the layers 0..{len(views) - 1}")
    for layer, view in views.items():
        _check_layer(view, list(kept.get(layer, range(view.count))), view.top_k if top_k is None else top_k)
    counts = {len(kept.get(layer, range(view.count))) for layer, view in views.items()}
    if uniform and len(counts) > 1:
        raise _bad("every layer must keep the same number of experts", f"found {sorted(counts)}")


def _check_layer(view: MoELayerView, ids: list[int], top_k: int) -> None:
    if not ids or sorted(set(ids)) != ids or ids[0] < 0 or ids[-1] >= view.count:
        raise _bad(f"layer {view.index}: kept experts must be ascending ids in 0..{view.count - 1}", f"got {ids}")
    if not 1 <= top_k <= len(ids):
        why = f"each token needs {top_k} experts, only {len(ids)} are kept"
        raise _bad(f"layer {view.index}: top-k {top_k} exceeds the kept experts", why)


def _bad(what: str, why: str) -> ConfigError:
    return ConfigError(what, where="plan: kept, top_k", why=why, next_command="set plan.experts and plan.top_k to fit")


@contextmanager
def masked(model: nn.Module, kept: Kept, top_k: int | None = None) -> Iterator[nn.Module]:
    """While open, `model` routes as if pruned to `kept` (and to `top_k`, where given); experts are not copied.

    Observers with a pre-hook on `experts` still see the teacher's expert ids. The model is as before on exit,
    also after an error.

    Raises:
        ConfigError: see `check_kept`; counts may differ between layers here.
    """
    check_kept(model, kept, top_k, uniform=False)
    with ExitStack() as undo:
        for view in moe_layers(model):
            ids = kept.get(view.index)
            if ids is not None and len(ids) < view.count:
                _mask_layer(view, ids, undo)
            if top_k is not None:
                _swap(view.router, "top_k", top_k, undo)
        counts = {view.router.weight.shape[0] for view in moe_layers(model)}
        if len(counts) == 1:  # the balance loss of transformers reads these two
            _swap(model, "num_experts", counts.pop(), undo)
        if top_k is not None:
            _swap(model, "num_experts_per_tok", top_k, undo)
        yield model


def _mask_layer(view: MoELayerView, ids: Sequence[int], undo: ExitStack) -> None:
    weight = view.router.weight
    rows = torch.tensor(ids, device=weight.device)
    _swap(view.router, "weight", nn.Parameter(weight.detach()[rows], requires_grad=weight.requires_grad), undo)
    hook = view.experts.register_forward_pre_hook(_to_teacher_ids(rows), prepend=True)
    undo.callback(hook.remove)


def _to_teacher_ids(rows: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def remap(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_TD, index_TK, *rest = inputs
        return (hidden_TD, rows[index_TK], *rest)

    return remap


def _swap(owner: nn.Module, name: str, value: Any, undo: ExitStack) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


@torch.no_grad()
def prune(model: nn.Module, kept: Kept, top_k: int | None = None) -> None:
    """Drop every expert that is not in `kept`, in place; router rows, counts and config follow.

    Keeping all experts changes no bit. Parameters are replaced, so an optimizer must be built afterwards.

    Raises:
        ConfigError: see `check_kept`; nothing has been changed then.
    """
    check_kept(model, kept, top_k)
    views = moe_layers(model)
    for view in views:
        ids = list(kept.get(view.index, range(view.count)))
        for owner, name in ((view.experts, "gate_up_proj"), (view.experts, "down_proj"), (view.router, "weight")):
            _keep_rows(owner, name, ids)
        view.experts.num_experts = view.router.num_experts = len(ids)
        if top_k is not None:
            view.router.top_k = top_k
            if hasattr(view.block, "top_k"):
                view.block.top_k = top_k
    _write_counts(model, views[0].count, top_k)


def _keep_rows(owner: nn.Module, name: str, ids: Sequence[int]) -> None:
    old = getattr(owner, name)
    if len(ids) < old.shape[0]:
        setattr(owner, name, nn.Parameter(old.detach()[list(ids)].contiguous(), requires_grad=old.requires_grad))


def _write_counts(model: nn.Module, count: int, top_k: int | None) -> None:
    """The numbers that the model and its config keep besides the tensors; the config may carry either key or both."""
    model.num_experts = count
    for key in EXPERT_COUNT_KEYS:
        if hasattr(model.config, key):
            setattr(model.config, key, count)
    if top_k is not None:
        model.num_experts_per_tok = model.config.num_experts_per_tok = top_k
