"""What a student layer misses of the teacher's routed output on calibration tokens, and refits that bring it nearer.

`LayerFit` keeps the books of one layer: the target is what the teacher's experts answered, the residual what the student
misses of it. A change of one expert is judged by what it does to the whole block, including the tokens that other experts
gave up when they were dropped: it is accepted only if the squared error falls on all tokens and on the last third of them,
which took no part in the fit. So the error never rises, whatever is proposed.

`refit` changes all down projections of a layer at once. The block's output is linear in them together, so their best change
is one ridge regression: MergeMoE's closed form (arXiv:2510.14436), with what the block misses as the target and every expert
in one problem, because experts that share tokens correct each other. Three things make it hold on text that it has not seen:

- Tokens with large outputs (attention sinks foremost) are scaled down to the median, or they are all that is fitted.
- The ridge pulls each neuron's column towards its present weights in proportion to the neuron's energy, which is the
  damping of Marquardt (1963); one strength for all would freeze quiet neurons and let loud ones run. Only the quietest
  are held as if they were louder: they may be loud in other text. On the demo teacher (8,192 tokens, 10 of 16 experts)
  that costs .169 -> .178 nats on text of the same kind and brings .309 -> .179 on source code.
- How strongly it pulls is decided on the last third of the tokens after a fit on the others. If no strength helps there
  the layer stays as it is, else it is fitted on all tokens.

Shape suffixes: T tokens, K top-k, D model, F expert width, N tokens of one expert.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_edge.formulas.ffn import Ffn, concatenate
from moe_edge.formulas.least_squares import Block, joint_ridge_maps, ridge_maps
from moe_edge.models.views import MoELayerView, down_project, expert_activations
from moe_edge.models.weights import read_expert, write_expert

FIT_SHARE = 2 / 3  # of the tokens; the others judge
RIDGES = (1e-3, 1e-2, 0.1, 1.0, 10.0)
MERGE_RIDGES = (0.01, 0.1, 1.0)  # of a merged expert alone
EQUAL = 1e-6  # share of the target's energy below which two errors count as equal
FLOOR = 0.3  # of an expert's root mean square, below which a neuron counts as that loud
TINY = 1e-12  # of a column's root mean square, so that silent neurons divide nothing by zero


class LayerFit:
    """The student's routed output in one layer, as a residual to the target."""

    def __init__(
        self, view: MoELayerView, hidden_TD: Tensor, target_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> None:
        """Args: target_TD: the teacher's routed output; index_TK: the layer's own expert ids, each at most once per token."""
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
        changes = ridge_maps((gate_N.unsqueeze(1) * act_NF.float())[fit_N], missed_ND, MERGE_RIDGES)
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


@torch.no_grad()
def refit(fit: LayerFit) -> float | None:
    """Refit the experts of a layer in place; returns the ridge, or None where the layer stays as it is."""
    weight_T = token_weights(fit.target())
    reads = {expert: _weighted(fit, expert, weight_T) for expert in fit.slots}
    scales = [column_scales(gated_NF) for _, gated_NF in reads.values()]
    blocks = [
        (token_N, gated_NF / scale_F) for (token_N, gated_NF), scale_F in zip(reads.values(), scales, strict=True)
    ]
    missed_TD = fit.residual_TD * weight_T.unsqueeze(1)
    ridge = _best_ridge(blocks, missed_TD, fit.boundary)
    if ridge is None:
        return None
    (changes,) = joint_ridge_maps(blocks, missed_TD, [ridge])
    for expert, scale_F, change_DF in zip(fit.slots, scales, changes, strict=True):
        _write(fit, expert, change_DF / scale_F)
    return ridge


def token_weights(target_TD: Tensor) -> Tensor:
    """1 for tokens with ordinary outputs, less for those beyond the median norm, so that none counts for more, [T]."""
    norm_T: Tensor = target_TD.float().norm(dim=1)
    return (norm_T.median() / norm_T.clamp_min(TINY)).clamp_max(1.0)


def column_scales(gated_NF: Tensor) -> Tensor:
    """Root mean square of what each neuron puts out, at least FLOOR of that of all, [F]."""
    square_NF = gated_NF.square()
    return torch.maximum(square_NF.mean(dim=0).sqrt(), FLOOR * square_NF.mean().sqrt()).clamp_min(TINY)


def _weighted(fit: LayerFit, expert: int, weight_T: Tensor) -> Block:
    """(tokens [N], weight x gate x what the down projection reads there [N, F] float32)."""
    token_N, gate_N = fit.slots[expert]
    return token_N, (weight_T[token_N] * gate_N).unsqueeze(1) * fit.activations(expert).float()


def _best_ridge(blocks: list[Block], missed_TD: Tensor, boundary: int) -> float | None:
    """The ridge that helps the tokens from `boundary` on most when it is fitted on the others; None if none does."""
    fitting_T = torch.arange(len(missed_TD), device=missed_TD.device) < boundary
    behind, errors = _of_tokens(blocks, ~fitting_T), []
    for changes in joint_ridge_maps(_of_tokens(blocks, fitting_T), missed_TD[:boundary], RIDGES):
        left_TD = missed_TD[boundary:].clone()
        for (token_N, inputs_NF), change_DF in zip(behind, changes, strict=True):
            left_TD[token_N - boundary] -= inputs_NF @ change_DF.T.to(inputs_NF.dtype)
        errors.append(squared_error(left_TD))
    least = min(errors)
    return RIDGES[errors.index(least)] if least < squared_error(missed_TD[boundary:]) else None


def _of_tokens(blocks: list[Block], chosen_T: Tensor) -> list[Block]:
    """The blocks without the tokens that are not chosen."""
    return [(token_N[chosen_T[token_N]], inputs_NF[chosen_T[token_N]]) for token_N, inputs_NF in blocks]


def _write(fit: LayerFit, expert: int, change_DF: Tensor) -> None:
    """Change a down projection in the model, in its own dtype, and the residual with it."""
    before_ND, old = fit.contribution(expert), read_expert(fit.view, expert)
    down_DF = (old.down_DF.double() + change_DF).to(old.down_DF.dtype)
    write_expert(fit.view, expert, old._replace(down_DF=down_DF))
    fit.residual_TD[fit.slots[expert][0]] += before_ND - fit.contribution(expert)
