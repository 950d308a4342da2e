"""The routed output of one student layer on calibration tokens, and changes of single experts that bring it to the target.

The target is what the teacher's experts answered on the same tokens. A change of one expert is judged by what it does to
the whole block, including the tokens that other experts gave up when they were dropped: it is accepted only if the
squared error falls on all tokens and on the last third of them, which took no part in the fit. So the error never rises,
whatever is proposed. The refit of all down projections together is in refit.py.

Shape suffixes: T tokens, K top-k, D model, F expert width, N tokens of one expert.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_edge.families.expert_weights import read_expert, write_expert
from moe_edge.families.views import MoELayerView, down_project, expert_activations
from moe_edge.formulas.ffn import Ffn, concatenate
from moe_edge.formulas.least_squares import ridge_maps

FIT_SHARE = 2 / 3  # of the tokens; the others judge
RIDGES = (0.01, 0.1, 1.0)
EQUAL = 1e-6  # share of the target's energy below which two errors count as equal


class LayerFit:
    """The student's routed output in one layer, as a residual to the target."""

    def __init__(
        self, view: MoELayerView, hidden_TD: Tensor, target_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> None:
        """Args: index_TK: the layer's own expert ids, each at most once per token."""
        self.view, self.hidden_TD = view, hidden_TD
        self.energy = float(target_TD.double().square().sum())
        self.boundary = int(len(hidden_TD) * FIT_SHARE)
        self.slots = {
            expert: _slots(index_TK, weight_TK, expert) for expert in sorted(set(index_TK.flatten().tolist()))
        }
        self.residual_TD = target_TD.float().clone()
        for expert in self.slots:
            self.residual_TD[self.slots[expert][0]] -= self.contribution(expert)

    @property
    def missed(self) -> float:
        """Share of the target's energy that the student misses."""
        return float(self.residual_TD.double().square().sum()) / self.energy if self.energy > 0 else 0.0

    def tokens_of(self, expert: int) -> Tensor:
        """Indices of the tokens that the student routes to an expert, ascending."""
        return self.slots[expert][0] if expert in self.slots else torch.empty(0, dtype=torch.long)

    def activations(self, expert: int) -> Tensor:
        """The inputs of an expert's down projection on its tokens, [N, F]."""
        return expert_activations(self.view, self.hidden_TD[self.slots[expert][0]], expert)

    def contribution(self, expert: int) -> Tensor:
        """Gate x output of an expert on its tokens, [N, D] float32."""
        gate_N = self.slots[expert][1]
        return gate_N.unsqueeze(1) * down_project(self.view, self.activations(expert), expert).float()

    def target(self) -> Tensor:
        """What the block should put out, [T, D] float32."""
        target_TD = self.residual_TD.clone()
        for expert, (token_N, _) in self.slots.items():
            target_TD[token_N] += self.contribution(expert)
        return target_TD

    def output(self, target_TD: Tensor) -> Tensor:
        """The student's routed output, given the target, in the target's dtype."""
        return (target_TD.float() - self.residual_TD).to(target_TD.dtype)

    def refits(self, expert: int, weights: Ffn) -> list[Ffn]:
        """`weights` in the place of an expert, with the down projections that come closest to the target: one per ridge.

        Fitted on the first two thirds of the tokens; the layer is left as it is.
        """
        token_N, gate_N = self.slots[expert]
        old, before_ND = read_expert(self.view, expert), self.contribution(expert)
        write_expert(self.view, expert, weights)
        act_NF = self.activations(expert)
        after_ND = gate_N.unsqueeze(1) * down_project(self.view, act_NF, expert).float()
        write_expert(self.view, expert, old)
        fit_N = token_N < self.boundary
        missed_ND = (self.residual_TD[token_N] + before_ND - after_ND)[fit_N]
        changes = ridge_maps((gate_N.unsqueeze(1) * act_NF.float())[fit_N], missed_ND, RIDGES)
        down = (weights.down_DF.double() + change_DF for change_DF in changes)
        return [weights._replace(down_DF=down_DF.to(weights.down_DF.dtype)) for down_DF in down]

    def accept_best(self, expert: int, candidates: Sequence[Ffn], slack: float = 0.0) -> bool:
        """Put the candidate with the least error on the judging tokens into the place of an expert, if it is no worse.

        Args:
            slack: share of the target's energy by which the error may rise; 0 asks for a lower one.

        Returns:
            Whether one was accepted; otherwise nothing has changed.
        """
        token_N, _ = self.slots[expert]
        judging_N = token_N >= self.boundary
        if not judging_N.any():
            return False
        old, before_ND = read_expert(self.view, expert), self.contribution(expert)
        without_ND = self.residual_TD[token_N] + before_ND
        trials = []
        for weights in candidates:
            write_expert(self.view, expert, weights)
            trials.append(without_ND - self.contribution(expert))
        errors = [squared_error(trial_ND[judging_N]) for trial_ND in trials]
        best = errors.index(min(errors))
        allowed = slack * self.energy
        now_ND = self.residual_TD[token_N]
        rises = [
            squared_error(trials[best][rows]) - squared_error(now_ND[rows])
            for rows in (judging_N, torch.ones_like(judging_N))
        ]
        accepted = all(rise <= allowed if slack else rise < 0 for rise in rises)
        write_expert(self.view, expert, candidates[best] if accepted else old)
        if accepted:
            self.residual_TD[token_N] = trials[best]
        return accepted

    def rescale(self) -> int:
        """Scale every expert's output in turn by the factor that fits best; returns how many factors were accepted."""
        accepted = 0
        for expert, (token_N, _) in self.slots.items():
            own_ND = self.contribution(expert).double()
            fit_N = token_N < self.boundary
            energy = float(own_ND[fit_N].square().sum())
            if energy > 0:
                factor = 1 + float((own_ND * self.residual_TD[token_N].double())[fit_N].sum()) / energy
                accepted += self.accept_best(expert, [concatenate([read_expert(self.view, expert)], [factor])])
        return accepted


def _slots(index_TK: Tensor, weight_TK: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """(tokens [N], gates [N] float32) of one expert."""
    token_N, place_N = torch.where(index_TK == expert)
    return token_N, weight_TK[token_N, place_N].float()


def squared_error(residual_ND: Tensor) -> float:
    """Sum of squares, in float64."""
    return float(residual_ND.double().square().sum())
