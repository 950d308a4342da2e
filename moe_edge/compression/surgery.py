"""Applying a plan to a loaded teacher: the plan's choice becomes the model's tensors, counts and configuration."""

from torch import nn

from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.plan import Plan
from moe_edge.families.pruning import prune
from moe_edge.families.views import moe_layers

ACTIONS = {"drop": prune}


def check_plan(plan: Plan, experts: int, layers: int) -> None:
    """Does the plan speak of a model of this size? Needs no weights.

    Raises:
        ConfigError: another expert count, missing layers, or an action that is not known.
    """
    if plan.action not in ACTIONS:
        raise ConfigError(f"unknown action '{plan.action}'", where="plan.json", why=f"known: {', '.join(ACTIONS)}")
    if plan.experts_total != experts:
        why = f"the plan is for {plan.experts_total} experts per layer, the teacher has {experts}"
        raise ConfigError("the plan belongs to another model", where="plan.json", why=why)
    expected = set(range(layers))
    if plan.prunes and set(plan.kept) != expected:
        why = f"expected kept experts for the layers 0..{layers - 1}, got {sorted(plan.kept)}"
        raise ConfigError("the plan belongs to another model", where="plan.json: kept", why=why)


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Make `model` the student that `plan` describes, in place. Untouched tensors keep every bit.

    Raises:
        ConfigError: the plan does not fit the model; nothing has been changed then.
    """
    views = moe_layers(model)
    check_plan(plan, views[0].count, len(views))
    ACTIONS[plan.action](model, plan.kept if plan.prunes else {}, plan.top_k)
