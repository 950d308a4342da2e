"""Greedy swaps: start from a criterion's choice and exchange experts, layer by layer, while the masked KL falls.

A model has far more swaps than a plan can run: 30 layers of 16 experts, 12 kept, have 1,440. So one forward and two
backward passes under the current choice predict all of them (local_model.py), and only the most promising
are run, from the changed layer upwards (partial_runs.py). Where the layers are few, every layer gets its own
trials; where they are many, a trial changes several neighbouring layers at once, because one swap among hundreds is less
than the noise of a thousand tokens. Predictions and trials of a sweep use different rows (where there are two at least),
and every sweep new ones as long as there are any, so that what is accepted was not proposed by the rows that accept it. A
trial is accepted when its mean over tokens is below the current KL by more than its standard error.

The work is counted in tokens of one teacher forward pass and stays within the budget. Groups keep their equal counts, and
guarded experts stay. The same seed gives the same result on the same machine. The result is not nested in that of a larger
count, unless the choice is restricted to it (`SwapRules.within`).

Shape suffixes: N rows, S tokens of a row, T tokens.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_edge.contracts.plan import KeptExperts
from moe_edge.formulas.swaps import standard_error
from moe_edge.models.views import moe_layers
from moe_edge.planning.local_model import PASSES, LocalLayer, local_layers
from moe_edge.planning.partial_runs import Meter, TrialRows
from moe_edge.process.progress import track

ROW_TOKENS = 128  # rows are cut to this, so that a budget sees more texts
SINGLE_LAYERS = 8  # up to so many MoE layers each is a part of its own and has its own trials
PARTS = 2  # of a deeper model, tried one after the other
TRIALS = 32  # of one sweep over single layers
JOINT_TRIALS = 4  # of one part of several layers
SWEEPS = 3  # that the budget is divided by
MOST_SWEEPS = 8  # where there are too few rows to spend the budget on
SHORT_LIST = 8  # experts to lose and to win that are paired where all pairs would be too many
SHARES = (1, 2)  # of a part's layers that change at once: all, the better half
SURE = 2.0  # standard errors by which a predicted gain must exceed zero: it is the best of dozens
CERTAIN = 1.0  # standard errors by which a trial must lower the KL
LOGIT_LIMIT = 1 << 27  # float32 values of the teacher's logits that are held: 512 MiB


@dataclass(frozen=True)
class SwapRules:
    """What a swap must respect."""

    top_k: int | None = None  # the student's, where it differs from the teacher's
    groups: int = 1  # of the router; a swap stays inside one
    guard: Mapping[int, Collection[int]] = field(default_factory=dict)  # decoder layer -> experts that stay
    residual_scale: float = 1.0  # of the model, see local_layers
    within: Mapping[int, Collection[int]] = field(default_factory=dict)  # the only ones that may stay; absent: all


@dataclass(frozen=True)
class SearchResult:
    """Where a search ended."""

    kept: dict[int, list[int]]
    swapped: int  # experts that differ from the start, over all layers
    sweeps: int
    tokens: int  # work, in tokens of a teacher forward pass


def search(
    model: PreTrainedModel,
    start: KeptExperts,
    ids_NS: Tensor,
    *,
    budget_tokens: int,
    rules: SwapRules = SwapRules(),
    seed: int = 0,
) -> SearchResult:
    """Improve `start` by swaps.

    Args:
        start: decoder layer -> kept expert ids; every layer keeps as many as it has here.
        ids_NS: rows to search on; no others are read.
        budget_tokens: an upper bound of the work, in tokens of one teacher forward pass.
        rules: what every set must respect; the start is taken to do so.
        seed: of the rows' order and of the labels drawn for the curvature.

    Returns:
        The set after the last accepted trial: on the rows of each trial it was better than the one before.
    """
    run = _Search(model, ids_NS, rules, budget_tokens, seed)
    kept: dict[int, list[int]] = {layer: list(ids) for layer, ids in start.items()}
    sweeps, changed = 0, True
    for sweep, part in track(run.steps(), "search", total=run.planned * len(run.parts)):
        if part == 0:
            if not changed and run.all_read:  # a whole sweep without a swap, and no row could tell anything new
                break
            run.begin_sweep(kept)
            sweeps, changed = sweep + 1, False
        better = run.improve(kept, part)
        changed |= better is not None
        kept = better or kept
    swapped = sum(len(set(kept[layer]) - set(start[layer])) for layer in kept)
    return SearchResult(kept, swapped, sweeps, round(run.meter.spent))


class _Search:
    """The rows, the budget and what is known about the current choice."""

    def __init__(self, model: PreTrainedModel, ids_NS: Tensor, rules: SwapRules, budget_tokens: int, seed: int) -> None:
        self.model, self.rules = model, rules
        self.generator = torch.Generator().manual_seed(seed)
        self.meter = Meter(model)
        self.parts = layer_parts([view.index for view in moe_layers(model)])
        self.trials = TRIALS // len(self.parts) if len(self.parts[-1]) == 1 else JOINT_TRIALS
        order_N = torch.randperm(len(ids_NS), generator=self.generator)
        self._pool_NS, self._next = ids_NS[order_N, :ROW_TOKENS], 0
        limit = LOGIT_LIMIT // (model.config.vocab_size * self._pool_NS.shape[1])
        per_row = self._sweep_passes() * self._pool_NS.shape[1]
        wished = int(budget_tokens / (SWEEPS * per_row))
        self.rows = max(1, min(wished, limit, len(ids_NS) // 2))  # twice: to predict on, and to try on
        self.planned = min(MOST_SWEEPS, int(budget_tokens / (self.rows * per_row)))
        self._rows: TrialRows
        self._layers: dict[int, LocalLayer] = {}
        self._predicted = PredictedMoves()
        self._now_T = torch.empty(0)

    def _sweep_passes(self) -> float:
        """Cost of a sweep per token of a set of rows."""
        trials = sum(self.trials * self.meter.share_from(part[0]) for part in self.parts)
        return PASSES + self.meter.experts_share + 2 + trials

    @property
    def all_read(self) -> bool:
        """Has every row been drawn at least once?"""
        return self._next >= len(self._pool_NS)

    def _draw(self, rows: int) -> Tensor:
        """The next rows; from the beginning again when all have been used."""
        places = [(self._next + offset) % len(self._pool_NS) for offset in range(rows)]
        self._next += rows
        return self._pool_NS[places]

    def steps(self) -> Iterator[tuple[int, int]]:
        """(sweep, part) in order."""
        return ((sweep, part) for sweep in range(self.planned) for part in range(len(self.parts)))

    def begin_sweep(self, kept: dict[int, list[int]]) -> None:
        """Take new rows: predict on some, and prepare trials on others."""
        found = local_layers(
            self.model,
            kept,
            self._draw(self.rows),
            top_k=self.rules.top_k,
            residual_scale=self.rules.residual_scale,
            generator=self.generator,
            meter=self.meter,
        )
        self._layers = {layer.view.index: layer for layer in found}
        self._rows = TrialRows(self.model, self._draw(self.rows), self.rules.top_k, self.meter)
        self._now_T, outputs = self._rows.run(kept)
        self._rows.adopt(outputs)

    def improve(self, kept: dict[int, list[int]], part: int) -> dict[int, list[int]] | None:
        """The best accepted trial in one part of the model, or None."""
        first, best = self.parts[part][0], None
        local = (self._layers[layer] for layer in self.parts[part])
        moves = [move for each in local for move in self._predicted.of(each, kept[each.view.index], self.rules)]
        for change in islice(proposals(moves), self.trials):
            trial = kept | change
            kl_T, outputs = self._rows.run(trial, first)
            gain_T = self._now_T - kl_T
            if float(gain_T.mean()) <= CERTAIN * float(standard_error(gain_T, self.rows)):
                continue
            if best is None or float(kl_T.mean()) < float(best[1].mean()):
                best = trial, kl_T, outputs
        if best is None:
            return None
        self._rows.adopt(best[2])
        self._now_T = best[1]
        return best[0]


def layer_parts(layers: Sequence[int]) -> list[list[int]]:
    """Neighbouring layers, lowest first; every layer by itself where they are few."""
    count = len(layers) if len(layers) <= SINGLE_LAYERS else PARTS
    bounds = [len(layers) * part // count for part in range(count + 1)]
    return [list(layers[start:stop]) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]


@dataclass(frozen=True)
class SwapPrediction:
    """An estimate and its standard error."""

    value: float
    se: float

    @property
    def sure(self) -> bool:
        return self.value > SURE * self.se

    @staticmethod
    def mean(predictions: Sequence["SwapPrediction"]) -> "SwapPrediction":
        """Of independent predictions of the same thing."""
        count, variance = len(predictions), sum(one.se**2 for one in predictions)
        return SwapPrediction(sum(one.value for one in predictions) / count, variance**0.5 / count)


@dataclass(frozen=True)
class Move:
    """A swap in one layer, and what is predicted for it."""

    layer: int
    ids: tuple[int, ...]
    gain: SwapPrediction  # nats that the KL falls
    likeness: SwapPrediction  # rise of the cosine to the teacher


class PredictedMoves:
    """What earlier sweeps predicted for a layer's swaps, as long as its set stays: each sweep reads other rows.

    The sets of other layers change meanwhile, but a swap's effect hardly depends on them, and noise falls with every sweep.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[int, ...]] = {}
        self._moves: dict[int, dict[tuple[int, ...], list[Move]]] = {}

    def of(self, local: LocalLayer, kept: Sequence[int], rules: SwapRules) -> list[Move]:
        """The layer's swaps, each with the mean of all predictions made for it under the present set."""
        layer = local.view.index
        if self._kept.get(layer) != tuple(kept):
            self._kept[layer], self._moves[layer] = tuple(kept), {}
        known = self._moves[layer]
        for move in _moves(local, kept, rules):
            known.setdefault(move.ids, []).append(move)
        return [
            Move(
                layer,
                ids,
                SwapPrediction.mean([one.gain for one in moves]),
                SwapPrediction.mean([one.likeness for one in moves]),
            )
            for ids, moves in known.items()
        ]


def _moves(local: LocalLayer, kept: Sequence[int], rules: SwapRules) -> list[Move]:
    view, guard = local.view, rules.guard.get(local.view.index, ())
    old = [expert for expert in kept if expert not in guard]
    allowed = rules.within.get(view.index, range(view.count))
    new = [expert for expert in allowed if expert not in kept]
    if len(old) * len(new) > SHORT_LIST**2:
        old, new = local.promising(old, new, SHORT_LIST, rules.top_k)
    sets = swaps(kept, old, new, view.count // rules.groups)
    if not sets:
        return []
    columns = zip(*(column.tolist() for column in local.predict(sets, rules.top_k)), strict=True)
    return [
        Move(view.index, tuple(ids), SwapPrediction(gain, gain_se), SwapPrediction(likeness, likeness_se))
        for ids, (gain, gain_se, likeness, likeness_se) in zip(sets, columns, strict=True)
    ]


def proposals(moves: Sequence[Move]) -> Iterator[dict[int, list[int]]]:
    """Changes of a few layers, most promising first, each one once.

    First the best sure swaps of all layers at once, then of the better half of the layers; then single swaps. Always by
    either prediction in turn.
    """
    rankings = [sorted(moves, key=lambda move: -move.gain.value), sorted(moves, key=lambda move: -move.likeness.value)]
    sure = [
        _best_per_layer(move for move in rankings[0] if move.gain.sure),
        _best_per_layer(move for move in rankings[1] if move.likeness.sure),
    ]
    joint = [dict(list(best.items())[: -(-len(best) // share)]) for share in SHARES for best in sure]
    singles = ({move.layer: list(move.ids)} for pair in zip(*rankings, strict=True) for move in pair)
    seen: list[dict[int, list[int]]] = [{}]
    for change in chain(joint, singles):
        if change not in seen:
            seen.append(change)
            yield change


def _best_per_layer(moves: Iterable[Move]) -> dict[int, list[int]]:
    """The first move of each layer, in the given order of preference."""
    best: dict[int, list[int]] = {}
    for move in moves:
        best.setdefault(move.layer, list(move.ids))
    return best


def swaps(kept: Sequence[int], old: Sequence[int], new: Sequence[int], group_size: int) -> list[list[int]]:
    """Every set in which one of `old` makes room for one of `new` of the same router group."""
    return [
        sorted([*(expert for expert in kept if expert != out), into])
        for out in old
        for into in new
        if out // group_size == into // group_size
    ]
