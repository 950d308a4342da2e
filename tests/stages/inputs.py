"""What stages are given, made of what a test writes: a teacher, a profile of plain statistics and random rows, a plan.

Shape suffixes: L MoE layers, E experts, D model width, G groups of blocks, N rows, S tokens of a row.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from moe_edge.api import open_teacher
from moe_edge.contracts.artifacts import PlanFolder, PlanSummary, ProfileFolder
from moe_edge.contracts.checkpoint import Teacher
from moe_edge.contracts.config_io import resolve_config
from moe_edge.contracts.plan import Plan
from moe_edge.contracts.targets_io import read_target
from moe_edge.models.loading import load_model
from moe_edge.models.views import moe_layers
from moe_edge.planning.allocation import header_plan
from moe_edge.stages import plan as plan_stage
from moe_edge.storage.rows import TokenRows
from moe_edge.storage.statistics import Statistics
from tests.compression.action_helpers import statistics_of
from tests.planning.plan_helpers import config
from tests.summaries import summary_of

EXPERTS, LAYERS, ROWS, LENGTH = 8, 2, 6, 16


def opened(folder: Path) -> Teacher:
    """A checkpoint folder as a teacher."""
    return open_teacher(resolve_config(read_target("cpu"), overrides={"teacher.path": str(folder)}))


def plain_statistics(experts: int = EXPERTS, layers: int = LAYERS, cka_tokens: int = 64) -> Statistics:
    """Statistics with a plain order: expert 0 is used most. No sums of activations."""
    ramp_LE = torch.arange(experts, 0, -1, dtype=torch.float64).repeat(layers, 1)
    unlike_LEE = torch.eye(experts, dtype=torch.float64).repeat(layers, 1, 1)
    nothing_LED, ones_L = torch.zeros(layers, experts, 4, dtype=torch.float64), torch.ones(layers, dtype=torch.float64)
    return Statistics(
        counts_LE=ramp_LE.long() * 10,
        gate_sum_LE=ramp_LE.clone(),
        norm_sum_LE=ramp_LE * 20,
        norm_sq_sum_LE=ramp_LE.flip(1) * 30,
        gated_norm_sum_LE=ramp_LE.sqrt(),
        norm_max_LE=ramp_LE.clone(),
        out_sum_LED=nothing_LED.clone(),
        out_sq_sum_LED=nothing_LED.clone(),
        router_entropy_L=ones_L.clone(),
        coroute_LEE=unlike_LEE.long(),
        gate_mass_L=ones_L.clone(),
        hsic_LEE=unlike_LEE.clone(),
        gated_hsic_LEE=unlike_LEE.clone(),
        hsic_groups_GLEE=unlike_LEE[None].float(),
        null_hsic_LEE=unlike_LEE * 0,
        layer_hsic_LL=torch.eye(layers, dtype=torch.float64),
        sink_share_L=ones_L * 0,
        loo_sq_sum_LE=ramp_LE * 5,
        loo_counts_LE=ramp_LE.long(),
        out_energy_L=ones_L.clone(),
        weight_mean_abs_LE=ramp_LE * 0 + 0.8,
        weight_rms_LE=ramp_LE * 0 + 1.0,
        cka_tokens=cka_tokens,
        tokens=360,
    )


def measured_statistics(teacher: Path, ids_NS: np.ndarray) -> Statistics:
    """The plain ones, with what all experts of a teacher really put out on some rows: CKA, and sums of activations."""
    model = load_model(teacher)
    views = moe_layers(model)
    found = statistics_of(model, torch.from_numpy(ids_NS).long())
    return replace(plain_statistics(views[0].count, len(views)), **vars(found))


def random_rows(rows: int = ROWS, row_tokens: int = LENGTH) -> np.ndarray:
    """Token ids [N, S] int32 that the tiny tokenizer knows."""
    return np.random.default_rng(0).integers(3, 300, size=(rows, row_tokens)).astype(np.int32)


def write_profile(
    folder: Path, statistics: Statistics | None = None, ids_NS: np.ndarray | None = None, digest: str = "profile"
) -> ProfileFolder:
    """A finished profile of these statistics and rows, by default the plain ones."""
    folder.mkdir(parents=True, exist_ok=True)
    ids_NS = random_rows() if ids_NS is None else ids_NS
    (statistics or plain_statistics()).save(folder / "statistics.safetensors")
    TokenRows(ids_NS, ids_NS.size).save(folder / "rows.safetensors")
    return ProfileFolder(folder, digest, summary_of("profile"))


def write_plan(folder: Path, plan: Plan | str) -> PlanFolder:
    """A finished plan; a text stands for what a user may have made of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(plan if isinstance(plan, str) else plan.to_json())
    return PlanFolder(folder, "plan", PlanSummary())


def run_plan(
    teacher: Path, out: Path, *settings: str, profile: ProfileFolder | None = None
) -> tuple[PlanSummary, Plan]:
    """The plan stage; (its summary, the plan that it wrote). Four of six rows judge, unless `settings` say otherwise."""
    out.mkdir(parents=True, exist_ok=True)
    wishes, model = config("plan.tokens=64", *settings), opened(teacher)
    given = profile or write_profile(out / "profile")
    summary = plan_stage.run(wishes, model, out, profile=given, budget=header_plan(model.headers, wishes))
    return summary, Plan.read(out / "plan.json")
