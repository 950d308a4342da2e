"""merge: a dropped expert flows into the kept one that CKA names, if the pair passes the gate; else it is just dropped.

Per layer and kept expert: every proposed member is tested for itself (formulas/merging.py), the passing ones are joined in
the order of their substitution error. Each time the neurons of the members are brought into the kept expert's order, the
saliency-weighted mean is taken, its down projection refitted, and the result accepted only if the layer's routed output
does not get worse. The router keeps the kept experts' rows alone, so the checkpoint is a standard one and really smaller.

Shape suffixes: T tokens, D model, F expert width.
"""

from dataclasses import asdict
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from moe_edge.compression.layers import Applied, StudentLayer
from moe_edge.compression.refit import EQUAL
from moe_edge.contracts.plan import Plan
from moe_edge.formulas.cka import cka_from_hsic
from moe_edge.formulas.ffn import Ffn, neuron_rows, weighted_mean
from moe_edge.formulas.merging import PairTest, neuron_matching, ratio_error, substitution
from moe_edge.models.views import expert_activations, expert_outputs
from moe_edge.models.weights import read_expert
from moe_edge.storage.statistics import Statistics

MATCHING_TOKENS = 1024  # on which the neurons of two experts are compared


def merge_layer(layer: StudentLayer, plan: Plan, statistics: Statistics | None, applied: Applied) -> None:
    """Merge what the plan proposes for this layer and passes the gate; one record per proposed pair."""
    pairs = plan.merges.get(layer.view.index, {})
    tests = {one: test_pair(layer, kept=other, dropped=one) for one, other in pairs.items()}
    records = {one: _record(layer, one, other, tests[one]) for one, other in pairs.items()}
    if statistics is not None:
        cka_EE = cka_from_hsic(statistics.gated_hsic_LEE[layer.view.position])
        for one, other in pairs.items():
            records[one]["cka"] = _number(float(cka_EE[one, other]))
    for kept in sorted(set(pairs.values())):
        passing = [one for one, other in pairs.items() if other == kept and tests[one].refusal is None]
        if passing and kept in layer.fit.slots:
            _merge_group(layer, kept, sorted(passing, key=lambda one: (tests[one].substitution_error, one)), records)
        for one in passing:
            if kept not in layer.fit.slots:
                records[one]["reason"] = "the student routes no calibration token to the kept expert"
    layer.record["merged"] = sum(record["accepted"] for record in records.values())
    applied.pairs += [records[one] for one in sorted(records)]


def test_pair(layer: StudentLayer, kept: int, dropped: int) -> PairTest:
    """The gate's numbers, on the tokens that the teacher routed to either of the two."""
    gate_kept_T, gate_dropped_T = (_gate(layer, expert) for expert in (kept, dropped))
    either_T = (gate_kept_T != 0) | (gate_dropped_T != 0)
    out_kept_TD, out_dropped_TD = expert_outputs(layer.view, layer.tokens.hidden_TD[either_T], [kept, dropped]).float()
    gate_kept_T, gate_dropped_T = gate_kept_T[either_T], gate_dropped_T[either_T]
    own_T = gate_dropped_T != 0
    missed, alpha = substitution(out_kept_TD[own_T], out_dropped_TD[own_T])
    lost = ratio_error(gate_kept_T, gate_dropped_T, out_kept_TD, out_dropped_TD)
    return PairTest(missed, alpha, lost, int(own_T.sum()))


def _gate(layer: StudentLayer, expert: int) -> Tensor:
    """The teacher's weight of an expert for every token, 0 where it is not chosen: [T] float32."""
    tokens = layer.tokens
    return (tokens.weight_TK.float() * (tokens.index_TK == expert)).sum(dim=1)


def _record(layer: StudentLayer, dropped: int, kept: int, test: PairTest) -> dict[str, Any]:
    record = {"layer": layer.view.index, "dropped": dropped, "kept": kept, "accepted": False, "reason": test.refusal}
    return record | asdict(test)


def _number(value: float) -> float | None:
    return value if isfinite(value) else None


def _merge_group(layer: StudentLayer, kept: int, candidates: list[int], records: dict[int, dict[str, Any]]) -> None:
    """Take the members in one after the other; a member that makes the layer worse stays out."""
    saliency = {expert: _saliency(layer, expert) for expert in (kept, *candidates)}
    experts = {kept: read_expert(layer.view, kept)}
    for member in candidates:
        experts[member], records[member]["matching_cost"] = _aligned(layer, kept, experts[kept], member)
    group = [kept]
    for member in candidates:
        tried = [*group, member]
        mean = weighted_mean([experts[expert] for expert in tried], [saliency[expert] for expert in tried])
        before = layer.fit.missed
        accepted = layer.fit.accept_best(kept, [mean, *layer.fit.refits(kept, mean)], slack=EQUAL)
        group = tried if accepted else group
        records[member] |= {
            "accepted": accepted,
            "reason": None if accepted else "the layer's routed output would get worse",
            "missed_before": before,
            "missed_after": layer.fit.missed,
        }


def _aligned(layer: StudentLayer, kept: int, reference: Ffn, member: int) -> tuple[Ffn, float]:
    """A member with its neurons in the kept expert's order, and the matching's relative cost."""
    either_T = (_gate(layer, kept) != 0) | (_gate(layer, member) != 0)
    hidden_TD = layer.tokens.hidden_TD[either_T][:MATCHING_TOKENS]
    weights = read_expert(layer.view, member)
    kept_TF, own_TF = (expert_activations(layer.view, hidden_TD, expert) for expert in (kept, member))
    order_F, cost = neuron_matching(kept_TF, own_TF, neuron_rows(reference), neuron_rows(weights))
    return weights.select(order_F), cost


def _saliency(layer: StudentLayer, expert: int) -> float:
    """sum over its tokens of gate x ||output||: what the expert contributes in the teacher."""
    gate_T = _gate(layer, expert)
    own_T = gate_T != 0
    if not own_T.any():
        return 0.0
    out_TD = expert_outputs(layer.view, layer.tokens.hidden_TD[own_T], [expert])[0].float()
    return float((gate_T[own_T].double() * torch.linalg.vector_norm(out_TD, dim=1).double()).sum())
