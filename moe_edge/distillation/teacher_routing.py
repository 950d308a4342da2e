"""Which experts a live teacher uses while it teaches, and that a resumed run draws them again.

`own`: the model's top-k. `all`: every expert by its gate. `ka`: knowledge augmentation (Kim et al. 2025, arXiv
2502.12947): now and then a token's experts are drawn by the gate, so that M passes over a batch say M different things.
In all but `own` a token's weights sum to what its own top-k's would.

What is drawn depends on the seed, the optimizer step, the draw and the place of the micro-batch in the step, and on
nothing that happened before.

Shape suffixes: T tokens, E experts, N experts in use per token.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from moe_edge.contracts.config import StageConfig, TeacherRoutingConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.terms import RecordsNothing
from moe_edge.formulas.routers import augmented_experts, every_expert
from moe_edge.models.routing import rerouted
from moe_edge.models.views import moe_layers


class AllExperts(RecordsNothing):
    """Every expert is active. `routing` is what LiveTeacher takes; it is a BatchHook and an Observer with nothing to do."""

    def __call__(self, batches: list[dict[str, Tensor]], step: int) -> list[dict[str, Tensor]]:
        return batches

    def routing(self, teacher: nn.Module, draw: int) -> AbstractContextManager[nn.Module]:
        return rerouted(teacher, lambda _layer, gate_TE, _preference_TE: every_expert(gate_TE))

    def read(self) -> dict[str, float]:
        return {}


class KnowledgeAugmentation(AllExperts):
    """With probability lambda, per token and layer, N experts drawn by the gate, else the top N.

    As a BatchHook it learns the step; as an Observer it reads `ka_sampled`, the share of (token, layer) that sampled, which
    is lambda up to chance, and `ka_changed`, the share whose experts differ from the top N, which is smaller.

    Args:
        seed: of the draws, with the step.

    Raises:
        ConfigError: when the teacher is asked for more experts than it has.
    """

    def __init__(self, config: TeacherRoutingConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._step, self._calls = 0, 0
        self._totals = np.zeros(3, dtype=np.int64)  # (token, layer) pairs, those that sampled, those that changed

    def __call__(self, batches: list[dict[str, Tensor]], step: int) -> list[dict[str, Tensor]]:
        self._step, self._calls = step, 0
        return batches

    @contextmanager
    def routing(self, teacher: nn.Module, draw: int) -> Iterator[nn.Module]:
        for view in moe_layers(teacher):
            _check_count(self._count(view.count), view.count, view.index)
        entropy = np.random.SeedSequence([self._seed % 2**64, self._step, draw, self._calls])
        device = next(teacher.parameters()).device
        generator = torch.Generator(device).manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
        self._calls += 1
        with rerouted(teacher, self._choice(generator)):
            yield teacher

    def _count(self, experts: int) -> int:
        return max(1, experts - 1) if self._config.experts is None else self._config.experts

    def _choice(self, generator: torch.Generator) -> Callable[[int, Tensor, Tensor], Tensor]:
        def choose(_layer: int, gate_TE: Tensor, preference_TE: Tensor) -> Tensor:
            count = self._count(gate_TE.shape[1])
            chance = self._config.sample_probability
            index_TN, sampled_T = augmented_experts(gate_TE, preference_TE, count, chance, generator)
            top_TN = preference_TE[sampled_T].topk(count, dim=-1).indices
            changed = index_TN[sampled_T].sort(dim=-1).values != top_TN.sort(dim=-1).values
            self._totals += (len(gate_TE), len(top_TN), int(changed.any(dim=-1).sum()))
            return index_TN

        return choose

    def read(self) -> dict[str, float]:
        pairs, sampled, changed = self._totals.tolist()
        self._totals[:] = 0
        if not pairs:
            return {}
        return {
            "ka_lambda": self._config.sample_probability,
            "ka_sampled": sampled / pairs,
            "ka_changed": changed / pairs,
        }


def _check_count(count: int, experts: int, layer: int) -> None:
    if count > experts:
        why = f"layer {layer} has {experts} experts, {count} are asked for"
        raise ConfigError("the teacher has fewer experts", where="distill.stages: teacher_routing.experts", why=why)


TEACHER_ROUTING: dict[str, Callable[[TeacherRoutingConfig, int], AllExperts | None]] = {
    "own": lambda _config, _seed: None,
    "all": lambda _config, _seed: AllExperts(),
    "ka": KnowledgeAugmentation,
}


def teacher_routing(stage: StageConfig, seed: int) -> AllExperts | None:
    """The policy of a stage; None: the teacher's own routing.

    Under a student-aware router `own` means `all`: its routers are trained to mix every expert (same paper, section 3.2).
    """
    own = stage.teacher_routing.policy == "own"
    policy = "all" if own and stage.student_aware_router is not None else stage.teacher_routing.policy
    return TEACHER_ROUTING[policy](stage.teacher_routing, seed)
