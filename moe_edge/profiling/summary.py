"""What the report tells about a profile: how much was read, what is unknown, and how alike the experts are.

Lists have one entry per MoE layer.

Shape suffixes: L MoE layers, E experts, G groups of blocks.
"""

from typing import Any

import torch
from torch import Tensor

from moe_edge.contracts.artifacts import ProfileSummary
from moe_edge.formulas.cka_bootstrap import mean_cka, mean_cka_ci
from moe_edge.formulas.saliency import super_experts
from moe_edge.storage.rows import TokenRows
from moe_edge.storage.statistics import Statistics


def profile_summary(statistics: Statistics, rows: TokenRows) -> ProfileSummary:
    """What stands in the profile's manifest; null where there is no evidence.

    `no_evidence` are experts that no token was routed to: nothing is known of them, and no pair with them counts in
    `mean_cka`. `cka_null` is the mean CKA that is left when one expert's tokens are shuffled: similarity at that level
    is none.
    """
    routed_LE = statistics.counts_LE > 0
    summary: dict[str, Any] = {
        "mode": statistics.meta["mode"],
        "dtype": statistics.meta["dtype"],
        "moe_layers": statistics.meta["moe_layers"],
        "tokens": statistics.tokens,
        "asked_tokens": rows.asked_tokens,
        "rows": len(rows.ids_NS),
        "calibration_digest": rows.digest,
        "cka_tokens": statistics.cka_tokens,
        "no_evidence": _ids(~routed_LE),
        "super_experts": _ids(super_experts(statistics)),
        "sink_share": _numbers(statistics.sink_share_L),
        "gate_mass": _numbers(statistics.gate_mass_L),
        "router_entropy_nats": _numbers(statistics.router_entropy_L),
    }
    summary |= _similarity(statistics, routed_LE)
    if rows.short:
        summary["note"] = f"the calibration text has only {rows.n_tokens} of the {rows.asked_tokens} tokens asked for"
    return ProfileSummary.model_validate(summary)


def _similarity(statistics: Statistics, routed_LE: Tensor) -> dict[str, Any]:
    """Mean CKA over pairs of different experts with evidence: plain with interval and null, and gate-weighted."""
    found: dict[str, Any] = {"mean_cka": [], "mean_cka_ci95": [], "cka_null": [], "mean_gated_cka": []}
    for layer, routed_E in enumerate(routed_LE):
        hsic_EE = statistics.hsic_LEE[layer]
        interval = mean_cka_ci(statistics.hsic_groups_GLEE[:, layer], routed_E)
        found["mean_cka"].append(_number(mean_cka(hsic_EE, routed_E)))
        found["mean_cka_ci95"].append(None if interval is None else [round(bound, 6) for bound in interval])
        found["cka_null"].append(_number(mean_cka(statistics.null_hsic_LEE[layer], routed_E, hsic_EE.diagonal())))
        found["mean_gated_cka"].append(_number(mean_cka(statistics.gated_hsic_LEE[layer], routed_E)))
    return found


def _ids(found_LE: Tensor) -> list[list[int]]:
    return [found_E.nonzero().flatten().tolist() for found_E in found_LE]


def _numbers(values_L: Tensor) -> list[float]:
    return [round(float(value), 6) for value in values_L]


def _number(value: Tensor) -> float | None:
    return None if bool(torch.isnan(value)) else round(float(value), 6)
