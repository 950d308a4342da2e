"""plan: which experts stay and how the student is stored, from headers, statistics and masked KL; changes nothing.

The budget is solved from headers alone; what that leaves open is measured (planning/planner.py). Writes plan.json: readable,
editable, without tensors, the same bytes every time; and where experts may go, the safe-ratio curve.
"""

import logging
from functools import cache, partial
from pathlib import Path

import torch

from moe_edge.compression.layers import Material
from moe_edge.compression.on_disk import held_whole
from moe_edge.contracts.artifacts import PlanFolder, PlanSummary, ProfileFolder
from moe_edge.contracts.checkpoint import Teacher
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.row_split import RowSplit
from moe_edge.contracts.spec import ModelSpec
from moe_edge.planning.allocation import BudgetAnswer
from moe_edge.planning.candidates import read_statistics
from moe_edge.planning.curve import Curve, curve_svg, limit_nats
from moe_edge.planning.document import PlanInputs
from moe_edge.planning.planner import plan_student
from moe_edge.planning.scoring import JudgingRows, judging_rows, open_scorer
from moe_edge.process.placement import settled, to_run
from moe_edge.storage.files import write_json_atomic, write_text_atomic
from moe_edge.storage.rows import TokenRows

log = logging.getLogger(__name__)


def run(
    config: BuildConfig, teacher: Teacher, out: Path, *, profile: ProfileFolder, budget: BudgetAnswer
) -> PlanSummary:
    """Write plan.json, and curve.json with its picture where a curve is measured.

    Args:
        budget: the header plan, solved once per build (planning/allocation.py).

    Raises:
        InfeasibleError: the masked KL exceeds plan.max_kl_nats.
        ConfigError, InputRejected: a profile that does not belong to the teacher, or lacks what the plan needs.
    """
    headers, mode = teacher.headers, config.profile.mode
    placement = settled(out, lambda: to_run(headers, config.teacher.dtype, mode))
    read = cache(partial(_calibration, profile, teacher.spec, config))
    plan = plan_student(
        budget,
        PlanInputs(config, headers, lambda: read()[0], lambda: read()[1], held_whole(headers, mode)),
        open_scorer=lambda: open_scorer(teacher.path, placement, scratch=out),
        save_curve=partial(_write_curve, out, limit_nats(config.plan)),
    )
    write_text_atomic(out / PlanFolder.DOCUMENT, plan.to_json())
    kept, total = plan.experts_kept, plan.experts_total
    loss = "" if plan.predicted_kl_nats is None else f", predicted KL {plan.predicted_kl_nats:.4f} nats"
    log.info("plan: %d of %d experts, %s%s", kept, total, plan.main_label, loss)
    return PlanSummary(notes=plan.notes)


def _calibration(profile: ProfileFolder, spec: ModelSpec, config: BuildConfig) -> tuple[Material, JudgingRows]:
    """What a plan may be fitted on, and the rows that judge it."""
    ids_NS = torch.from_numpy(TokenRows.load(profile.rows).ids_NS).long()
    split = RowSplit(*ids_NS.shape)
    fit = split.fit(config.plan.action_tokens, config.plan.tokens)
    material = Material(read_statistics(profile.statistics, spec), ids_NS[fit.start : fit.stop])
    return material, judging_rows(ids_NS, split, config.plan.tokens)


def _write_curve(out: Path, limit_nats: float, curve: Curve, chosen: int) -> None:
    write_json_atomic(out / PlanFolder.CURVE, curve.to_json(limit_nats))
    write_text_atomic(out / PlanFolder.CURVE_PICTURE, curve_svg(curve, limit_nats, chosen))
