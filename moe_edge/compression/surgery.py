"""Applying a plan to a loaded teacher: the plan's choice becomes the model's tensors, counts and configuration."""

from collections.abc import Callable, Collection

from transformers import PreTrainedModel

from moe_edge.compression.dense import make_dense
from moe_edge.compression.layers import Applied, Material, work_on_layers
from moe_edge.compression.merge import merge_layer
from moe_edge.compression.shared_core import share_core
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.plan import Action, Plan
from moe_edge.models.pruning import prune
from moe_edge.models.views import moe_layers


def drop(applied: Applied, plan: Plan, material: Material) -> None:
    """Remove experts; narrow and refit the others where the plan says so."""
    work_on_layers(plan, material, applied)
    prune(applied.model, plan.kept if plan.prunes else {}, plan.top_k, uneven=plan.uneven)


def merge(applied: Applied, plan: Plan, material: Material) -> None:
    """Merge the pairs that pass the gate into kept experts, then remove experts as `drop`."""
    work_on_layers(plan, material, applied, act=lambda layer: merge_layer(layer, plan, material.statistics, applied))
    prune(applied.model, plan.kept if plan.prunes else {}, plan.top_k, uneven=plan.uneven)


ACTIONS: dict[Action, Callable[[Applied, Plan, Material], None]] = {
    "drop": drop,
    "merge": merge,
    "shared-core": share_core,
    "dense": make_dense,
}


def check_plan(plan: Plan, experts: int, layers: Collection[int]) -> None:
    """Does the plan speak of a model of this size? Needs no weights.

    Args:
        layers: indices of the decoder layers that have experts.

    Raises:
        ConfigError: another expert count, or missing layers.
    """
    if plan.experts_total != experts:
        why = f"the plan is for {plan.experts_total} experts per layer, the teacher has {experts}"
        raise ConfigError("the plan belongs to another model", where="plan.json", why=why)
    if plan.prunes and set(plan.kept) != set(layers):
        why = f"expected kept experts for the layers {sorted(layers)}, got {sorted(plan.kept)}"
        raise ConfigError("the plan belongs to another model", where="plan.json: kept", why=why)


def apply_plan(model: PreTrainedModel, plan: Plan, material: Material | None = None) -> Applied:
    """Make `model` the student that `plan` describes; tensors that the plan does not touch keep every bit.

    The model is changed in place for drop and merge; shared-core and dense return another one in `Applied.model`.

    Raises:
        ConfigError: the plan does not fit the model (nothing has been changed then), or needs what `material` lacks.
        InputRejected: the action does not know this family.
    """
    views = moe_layers(model)
    check_plan(plan, views[0].count, [view.index for view in views])
    applied = Applied(model)
    ACTIONS[plan.action](applied, plan, material or Material())
    return applied
