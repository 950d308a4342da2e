"""Refit of all down projections of a layer at once, against what the whole block misses.

The block's output is linear in the down projections of all kept experts together, so their best change is one ridge
regression: MergeMoE's closed form (arXiv:2510.14436), with what the block misses as the target and every expert in one
problem, because experts that share tokens correct each other. On the 134.8 M benchmark model (10 of 16 experts, 8 of them
per token) experts refitted one by one end at .202 nats from the teacher, all at once at .111. The ridge pulls towards the
present weights; how strongly is decided on the last third of the tokens after a fit on the others. If no strength helps
there the layer stays as it is, else it is fitted on all tokens (.121 without that).

Shape suffixes: N tokens of one expert, T tokens, D model, F expert width.
"""

from torch import Tensor

from moe_edge.compression.layer_fit import LayerFit, squared_error
from moe_edge.families.expert_weights import read_expert, write_expert
from moe_edge.formulas.least_squares import Block, joint_ridge_maps

RIDGES = (1e-3, 1e-2, 0.1, 1.0, 10.0)


def refit(fit: LayerFit) -> float | None:
    """Refit the experts of a layer in place; returns the ridge, or None where the layer stays as it is."""
    reads = {expert: _reads(fit, expert) for expert in fit.slots}
    fitting = {expert: token_N < fit.boundary for expert, (token_N, _) in reads.items()}
    fitted = [(token_N[fitting[e]], gated_NF[fitting[e]]) for e, (token_N, gated_NF) in reads.items()]
    judging = [(token_N[~fitting[e]], gated_NF[~fitting[e]]) for e, (token_N, gated_NF) in reads.items()]
    candidates = joint_ridge_maps(fitted, fit.residual_TD[: fit.boundary], RIDGES)
    errors = [_error_after(fit, judging, changes) for changes in candidates]
    best = errors.index(min(errors))
    if errors[best] >= squared_error(fit.residual_TD[fit.boundary :]):
        return None
    (changes,) = joint_ridge_maps(list(reads.values()), fit.residual_TD, [RIDGES[best]])
    for (expert, (token_N, gated_NF)), change_DF in zip(reads.items(), changes, strict=True):
        old = read_expert(fit.view, expert)
        down_DF = (old.down_DF.double() + change_DF).to(old.down_DF.dtype)
        write_expert(fit.view, expert, old._replace(down_DF=down_DF))
        fit.residual_TD[token_N] -= gated_NF @ (down_DF.float() - old.down_DF.float()).T
    return RIDGES[best]


def _reads(fit: LayerFit, expert: int) -> Block:
    """(tokens [N], gate x what the down projection reads there [N, F] float32)."""
    token_N, gate_N = fit.slots[expert]
    return token_N, gate_N.unsqueeze(1) * fit.activations(expert).float()


def _error_after(fit: LayerFit, blocks: list[Block], changes_DF: list[Tensor]) -> float:
    """Squared error of the judging tokens if the down projections changed."""
    residual_TD = fit.residual_TD[fit.boundary :].clone()
    for (token_N, gated_NF), change_DF in zip(blocks, changes_DF, strict=True):
        residual_TD[token_N - fit.boundary] -= gated_NF @ change_DF.T.float()
    return squared_error(residual_TD)
