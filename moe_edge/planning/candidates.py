"""The sets of experts that a plan compares: every criterion's choice, by the decoder layers of the model.

Statistics count MoE layers from 0; plans and models speak of decoder layers. Here the one becomes the other, the router's
groups and the super-expert guard come in, and what the statistics cannot say is said in words.

Shape suffixes: L MoE layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.contracts.plan import KeptExperts
from moe_edge.contracts.spec import ModelSpec
from moe_edge.formulas.saliency import super_experts
from moe_edge.formulas.selection import CRITERIA, NEEDS_EVIDENCE_BLOCKS, first_in_order, keep_prefix, rank
from moe_edge.formulas.uneven import bounds, deal, keep_uneven, score_shares
from moe_edge.storage.statistics import Statistics

AUTO = "auto"
SEARCH = "search"


@dataclass(frozen=True)
class Candidates:
    """The statistics of a teacher, and the conditions under which experts are chosen from them."""

    stats: Statistics
    layers: Sequence[int]  # the decoder layer of every position
    groups: int = 1  # of the router
    seed: int = 0  # of "random"
    guarded: bool = True  # do super experts stay?
    within: KeptExperts = field(default_factory=dict)  # the only experts that may stay; empty: all may
    uneven: bool = False  # may layers keep different numbers, n_keep on average
    possible: Sequence[int] = ()  # uneven: the numbers that a layer can keep, ascending
    most: int | None = None  # uneven: the most of them that a layer may keep

    def kept(self, criterion: str, n_keep: int) -> KeptExperts:
        """Decoder layer -> the experts that stay under a criterion, a prefix of its ranking: at fewer experts a subset.

        Those of an earlier plan come first, in the criterion's order, so that the choice is nested in it, too. Uneven
        layers keep prefixes of different lengths, by the criterion's score (formulas/uneven.py).
        """
        order_LE = rank(criterion, self.stats, self.seed, self._guard_LE if self.guarded else None)
        if self.uneven:
            fewest, most = bounds(n_keep, self.possible, self.most)
            counts = deal(score_shares(criterion, self.stats), n_keep, fewest, most, self.groups)
            return dict(zip(self.layers, keep_uneven(order_LE, counts, self.groups).values(), strict=True))
        if self.within:
            order_LE = first_in_order(order_LE, self._within_LE)
        return dict(zip(self.layers, keep_prefix(order_LE, n_keep, self.groups).values(), strict=True))

    @property
    def _within_LE(self) -> Tensor:
        within_LE = torch.zeros(self.stats.counts_LE.shape, dtype=torch.bool)
        for position, layer in enumerate(self.layers):
            within_LE[position, list(self.within[layer])] = True
        return within_LE

    @property
    def _guard_LE(self) -> Tensor:
        return super_experts(self.stats)

    @property
    def guard(self) -> KeptExperts:
        """Decoder layer -> experts that stay under every criterion but "random"; layers without one are absent."""
        if not self.guarded:
            return {}
        guard_LE = self._guard_LE & self._within_LE if self.within else self._guard_LE
        found = zip(self.layers, guard_LE, strict=True)
        return {layer: row.nonzero().flatten().tolist() for layer, row in found if bool(row.any())}

    def notes(self) -> list[str]:
        """What the reader of a plan should know about the evidence."""
        notes, unrouted = [], int((self.stats.counts_LE == 0).sum())
        if self.guard:
            names = "; ".join(f"layer {layer}: {', '.join(map(str, ids))}" for layer, ids in self.guard.items())
            notes.append(
                f"Kept under every criterion but 'random' as super experts (plan.super_expert_guard): {names}."
            )
        if unrouted:
            notes.append(f"{unrouted} experts saw no token of the profile: no evidence, so they are dropped first.")
        return notes


def read_statistics(path: Path, spec: ModelSpec) -> Statistics:
    """The profile's statistics.

    Raises:
        InputRejected: they are of a model with other layers or experts.
    """
    statistics, expected = Statistics.load(path), (len(spec.moe_layers), spec.moe.experts)
    if tuple(statistics.counts_LE.shape) != expected:
        raise InputRejected(
            "the profile belongs to another teacher",
            where=str(path),
            why=f"it has (MoE layers, experts) = {tuple(statistics.counts_LE.shape)}, not {expected}",
            next_command="moe-edge profile TEACHER --fresh",
        )
    return statistics


def criteria_to_compare(asked: str, stats: Statistics) -> list[str]:
    """All criteria (auto), or the named one with "random" beside it.

    Raises:
        ConfigError: the named one reads the CKA tokens and the profile has none; under auto it is left out instead.
    """
    missing = () if stats.cka_tokens else NEEDS_EVIDENCE_BLOCKS
    if asked == AUTO:
        return [name for name in CRITERIA if name not in missing]
    if asked in missing:
        raise ConfigError(
            f"{asked} needs a profile with CKA",
            where="plan.criterion",
            why="profile.cka_tokens is 0",
            next_command="--set profile.cka_tokens=8192, or --set plan.criterion=auto",
        )
    return list(dict.fromkeys([asked, "random"]))
