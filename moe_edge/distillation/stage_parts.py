"""From a stage's configuration to what takes part in its training: terms, hooks, observers, and the live teacher.

The teacher is loaded only where something wants it: a loss on its layers or routers, a routing of its own, rows that the
student writes, or `teacher: live`. Everything else is served by the cache, which needs no teacher in memory.
"""

from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from moe_edge.contracts.config import DistillConfig, StageConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.cross_tokenizer import CROSS_TOKENIZER_TERMS, CrossTokenizerTerm, compares_tokens
from moe_edge.distillation.expert_terms import EXPERT_TERMS
from moe_edge.distillation.feature_terms import FEATURE_TERMS
from moe_edge.distillation.losses import LOSSES, active_weights, of_kind
from moe_edge.distillation.rollouts import Rollouts
from moe_edge.distillation.router_terms import ROUTER_TERMS
from moe_edge.distillation.schedule import recipe_of, updates_per_batch
from moe_edge.distillation.signal import CachedSignal
from moe_edge.distillation.student_aware_router import StudentAwareRouter
from moe_edge.distillation.teacher import LiveTeacher, teacher_model
from moe_edge.distillation.teacher_routing import AllExperts, teacher_routing
from moe_edge.distillation.telemetry import RoutingTelemetry
from moe_edge.distillation.terms import Needs, Term, TermContext, TermInputs
from moe_edge.distillation.trainer import Parts
from moe_edge.models.students import is_mixture

TERMS = {**FEATURE_TERMS, **EXPERT_TERMS, **ROUTER_TERMS, **CROSS_TOKENIZER_TERMS}


def stage_weights(config: DistillConfig, stage: StageConfig) -> dict[str, float]:
    """The active losses of a stage with their whole factors; raises ConfigError as `active_weights`."""
    return active_weights({name: float(weight) for name, weight in stage.losses.items()}, *stage_blend(config, stage))


def stage_blend(config: DistillConfig, stage: StageConfig) -> tuple[float, float]:
    """(alpha, temperature) of a stage."""
    alpha = config.alpha if stage.alpha is None else stage.alpha
    return alpha, config.temperature if stage.temperature is None else stage.temperature


def wants_live_logits(config: DistillConfig, stage: StageConfig) -> bool:
    """Must the teacher's logits come from the teacher itself?

    Raises:
        ConfigError: the stage says `cached`, and only a live teacher can do what it asks, or no loss reads its logits.
    """
    reasons = {
        "on_policy": stage.on_policy is not None,
        "teacher_routing": stage.teacher_routing.policy != "own",
        "student_aware_router": stage.student_aware_router is not None,
    }
    asked = [name for name, on in reasons.items() if on]
    if asked and stage.teacher == "cached":
        why = f"{asked[0]} changes what the teacher says, and the cache holds what it said before"
        raise ConfigError("this stage needs the live teacher", where=f"distill.stages: {stage.stage_name}", why=why)
    divergence = bool(of_kind(stage_weights(config, stage), "divergence"))
    if asked and not divergence:
        why = f"{asked[0]} is about what the teacher says, and no loss with a weight compares the student with it"
        where = f"distill.stages: {stage.stage_name}: losses"
        raise ConfigError("this stage has no divergence", where=where, why=why, next_command="losses: {reverse_kl: 1}")
    return divergence and (bool(asked) or stage.teacher == "live")


def wants_teacher(config: DistillConfig, stage: StageConfig) -> bool:
    """Must the teacher be in memory in this stage?"""
    return wants_live_logits(config, stage) or any(LOSSES[name].teacher for name in stage_weights(config, stage))


def teacher_source(config: DistillConfig, stage: StageConfig) -> Literal["live", "cached", "none"]:
    """Where the losses on logits have the teacher's word from; none: no loss compares distributions."""
    if wants_live_logits(config, stage):
        return "live"
    return "cached" if of_kind(stage_weights(config, stage), "divergence") else "none"


def losses_on_tokens(config: DistillConfig) -> set[str]:
    """The active losses of all stages that hold student and teacher against each other token by token."""
    return {name for stage in recipe_of(config) for name in stage_weights(config, stage) if compares_tokens(name)}


def require_temperatures(config: DistillConfig, signal: CachedSignal) -> None:
    """Refuse a cache that cannot say what the stages ask, or the held-out KL at T = 1; raises ConfigError."""
    signal.require(1.0)
    for stage in recipe_of(config):
        if not wants_live_logits(config, stage):
            signal.require(stage_blend(config, stage)[1])


@dataclass(frozen=True)
class PartsBuilder:
    """Builds the parts of a stage.

    `steps`: of the stage. `vocab`: true vocabulary. `inputs`: what terms are built from beside the models.
    """

    config: DistillConfig
    teacher: Path
    steps: int
    vocab: int
    inputs: TermInputs

    def build(self, student: PreTrainedModel, stage: StageConfig) -> tuple[Parts, LiveTeacher | None]:
        """The parts, and the teacher where one is in memory; raises ConfigError where the student cannot have a loss."""
        device, live = next(student.parameters()).device, wants_live_logits(self.config, stage)
        model = teacher_model(self.teacher, device) if wants_teacher(self.config, stage) else None
        temperature = stage_blend(self.config, stage)[1]
        context = TermContext(student, model, stage, self.inputs, temperature)
        terms = [TERMS[name](context) for name in of_kind(stage_weights(self.config, stage), "term")]
        routing = teacher_routing(stage, self.config.seed) if live else None
        needs = reduce(Needs.__or__, (term.needs for term in terms), Needs())
        teacher = None
        if model is not None:
            teacher = LiveTeacher(model, needs, live, None if routing is None else routing.routing)
        helpers: list[AllExperts | Rollouts] = [] if routing is None else [routing]
        if stage.on_policy is not None:
            repeats = updates_per_batch(stage)
            helpers.append(Rollouts(student, stage.on_policy, self.steps, self.config.seed, repeats))
        return self._parts(student, stage, terms, teacher, helpers), teacher

    def _parts(
        self,
        student: PreTrainedModel,
        stage: StageConfig,
        terms: list[Term],
        teacher: LiveTeacher | None,
        helpers: list[AllExperts | Rollouts],
    ) -> Parts:
        """`helpers` are hooks and observers at once; a router step comes after the rows are settled."""
        kept = [one for one in helpers if isinstance(one, Rollouts) and one.repeats > 1]
        stateful: dict[str, Any] = {"rollouts": kept[0]} if kept else {}
        if stage.student_aware_router is not None and teacher is not None:
            stateful["student_aware_router"] = StudentAwareRouter(
                student, teacher, stage.student_aware_router, self.vocab
            )
        hooks = [*helpers, *(part for part in stateful.values() if part not in helpers)]
        observers = [*hooks, *(term for term in terms if isinstance(term, CrossTokenizerTerm))]
        if is_mixture(student):
            stateful["telemetry"] = RoutingTelemetry(student)
            observers.append(stateful["telemetry"])
        routing = stage.teacher_routing
        averaged = routing.policy == "ka" and routing.mode == "code"
        return Parts(terms, hooks, observers, stateful, routing.draws if averaged else 1)
