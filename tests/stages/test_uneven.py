"""plan.uneven through the stages: what is chosen, that training leaves padding alone, what the files hold, and what is refused
before any work."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_edge.compression.surgery import apply_plan
from moe_edge.contracts.artifacts import PlanFolder
from moe_edge.contracts.errors import ConfigError, MoeEdgeError
from moe_edge.contracts.plan import Plan
from moe_edge.models.loading import load_model
from moe_edge.models.padding import check_padding
from moe_edge.models.pruning import masked
from moe_edge.models.views import moe_layers
from moe_edge.pipeline import Build, run_stages
from moe_edge.planning.allocation import header_plan
from moe_edge.planning.estimate import GGUF_HEADER_BYTES
from moe_edge.planning.scoring import WholeScorer
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.rows import TokenRows
from tests.exporting.gguf_models import REPRESENTABLE
from tests.exporting.onnx_models import initializers
from tests.planning.plan_helpers import config
from tests.stages.inputs import opened, write_plan
from tests.tiny import tiny_checkpoint, tiny_ids
from tests.uneven_models import SIZES, skewed_teacher, uneven_student

SETTINGS = (
    "calibration.tokens=1024",
    "calibration.sequence_length=32",
    "profile.cka_tokens=256",
    "plan.tokens=256",
    "plan.curve_tokens=128",
    "plan.search_tokens=3000",
    "distill.tokens=512",
    "plan.experts=4",
    "plan.uneven=true",
    "target.context_length=64",
    "target.runtime.threads=1",
    "plan.compensate=true",
    "plan.action_tokens=512",
)
FAMILIES = ("lfm2_moe", "gpt_oss")  # one of each bias; both are written as GGUF and as ONNX


class Run:
    """The stages of one build, each run once on the folders of those before it."""

    def __init__(self, teacher: Path, top: Path, *settings: str, until: str) -> None:
        config_ = config(*SETTINGS, *settings)
        given = {"plan": {"budget": header_plan(inspect_checkpoint(teacher), config_)}}
        self.build = Build(config_, opened(teacher), top, given=given)
        run_stages(self.build, until=until)

    def summary(self, stage: str) -> Any:
        return self.build.finished(stage).summary

    @property
    def plan(self) -> Plan:
        return PlanFolder.open(self.build.folder("plan")).plan


@pytest.fixture(scope="module", params=FAMILIES)
def built(request, tmp_path_factory) -> Run:
    top = tmp_path_factory.mktemp(request.param)
    teacher = skewed_teacher(top, request.param, **REPRESENTABLE[request.param])
    return Run(teacher, top / "run", "plan.criterion=frequency", until="export")


@torch.no_grad()
def logits(model: nn.Module, ids_NS: torch.Tensor) -> torch.Tensor:
    return model(ids_NS).logits


def test_the_score_decides_over_all_layers_together(built) -> None:
    found = built.plan
    counts = [len(ids) for ids in found.kept.values()]
    assert (
        found.uneven and sum(counts) == 4 * len(counts) and min(counts) == counts[0] == 2 < max(counts) == found.places
    )
    rows = TokenRows.load(built.build.finished("profile").rows).ids_NS[-8:]
    model = load_model(built.build.teacher.path)
    nats = WholeScorer(model).masked_kl({"x": found.kept}, torch.from_numpy(rows))["x"].kl_nats
    assert nats == pytest.approx(found.predicted_kl_nats, rel=1e-4)
    told = " ".join(found.notes)
    assert f"Layers keep 2 to {max(counts)} experts, 4 on average" in told and "plan.uneven=false" in told
    assert built.summary("compress").student.experts_per_layer == counts


def test_the_plan_foresees_what_padding_costs(built) -> None:
    plan, found = built.plan, built.plan.estimate
    main = next(row for row in built.summary("export").artifacts if row.quantization == plan.quantization)
    assert 0 <= found.file_bytes - main.bytes <= GGUF_HEADER_BYTES  # which are assumed, the rest is exact
    even = header_plan(built.build.teacher.headers, built.build.config).choice.estimate
    assert found.file_bytes > even.file_bytes and found.params_total == even.params_total
    assert built.summary("compress").student.params_total == even.params_total


def test_compressing_is_what_the_plan_masked(built) -> None:
    found = built.plan.model_copy(update={"compensate": False})
    model, ids = load_model(built.build.teacher.path), tiny_ids(32, 2)
    with masked(model, found.kept):
        expected = logits(model, ids)
    student = apply_plan(model, found).model
    torch.testing.assert_close(logits(student, ids), expected, rtol=0, atol=1e-5)


def test_padding_is_not_dead_and_training_leaves_it_alone(built) -> None:
    health = built.summary("compress").routing_health
    counts = [len(ids) for ids in built.plan.kept.values()]
    for row, count in zip(health.layers, counts, strict=True):
        assert all(expert < count for expert in row["student"]["dead_experts"])
    student = load_model(built.build.finished("distill").model)
    check_padding(student)
    assert [len(view.real) for view in moe_layers(student)] == counts


def test_files_are_judged_against_the_student_and_onnx_stores_no_padding(built) -> None:
    exported = built.build.finished("export")
    assert {"gguf F16", "onnx fp32"} <= {row["artifact"] for row in exported.summary.parity}
    assert exported.summary.imatrix and "uneven" in exported.summary.name
    weights = initializers(exported.path / "reference" / "onnx-fp32")
    for layer, ids in built.plan.kept.items():
        assert len(weights[f"model.layers.{layer}.moe.down.weight"]) == len(ids)
    packed = initializers(exported.onnx)
    for layer, ids in built.plan.kept.items():
        assert len(packed[f"model.layers.{layer}.moe.down.weight_Q4"]) == len(ids)


def test_auto_compares_all_criteria_and_the_search_keeps_the_numbers(tmp_path) -> None:
    found = Run(skewed_teacher(tmp_path, "minimax_m2"), tmp_path / "run", until="plan").plan
    assert "search" in {one.criterion for one in found.candidates} and any("'search' started" in n for n in found.notes)
    counts = {len(ids) for ids in found.kept.values()}
    assert sum(map(len, found.kept.values())) == 12 and (len(counts) > 1) == found.uneven


def test_a_padded_gguf_stays_within_the_budget(tmp_path) -> None:
    """No layer grows beyond what all layers could have under it; with room for four nothing is left to be uneven."""
    teacher = skewed_teacher(tmp_path, "minimax_m2")
    settings = ("plan.criterion=frequency", "plan.bits=F16", "export.formats=[gguf]")
    four = header_plan(inspect_checkpoint(teacher), config(*SETTINGS, *settings)).choice.estimate.file_bytes
    plan = Run(teacher, tmp_path / "run", *settings, f"target.budget.weights={four}", until="plan").plan
    assert not plan.uneven and plan.estimate.file_bytes <= four


@pytest.mark.parametrize(
    ("family", "settings", "exit_code", "word"),
    [
        ("mixtral", (), 4, "no bias of its router"),
        ("qwen3_moe", (), 4, "no bias of its router"),
        ("ernie4_5_moe", (), 4, "softmax over all experts"),
        ("gpt_oss", ("plan.action=dense",), 2, "plan.action"),
        ("gpt_oss", ("plan.top_k=auto",), 2, "top-k"),
        ("gpt_oss", ("plan.within=plan.json",), 2, "nested plans"),
        ("gpt_oss", ("plan.experts=auto", "target.budget.experts=null"), 2, "budget of bytes"),
        ("gpt_oss", ("distill.stages=[{stage_name: all, share: 1.0, losses: {expert_cka: 1.0}}]",), 2, "expert_cka"),
    ],
)
def test_it_is_refused_before_any_work(family, settings, exit_code, word, tmp_path) -> None:
    headers = inspect_checkpoint(tiny_checkpoint(tmp_path, family, **SIZES))
    with pytest.raises(MoeEdgeError, match=word) as caught:
        header_plan(headers, config(*SETTINGS, *settings))
    assert caught.value.exit_code == exit_code and "--set plan." in str(caught.value.next_command)


def test_a_padded_student_is_no_teacher_for_less(tmp_path) -> None:
    student, _ = uneven_student(tmp_path, "minimax_m2")
    headers = inspect_checkpoint(student)
    with pytest.raises(MoeEdgeError, match="compressed again") as caught:
        header_plan(headers, config("plan.experts=5"))
    assert caught.value.exit_code == 4
    assert header_plan(headers, config("plan.experts=6", "plan.bits=F16")).keeps_all


def test_an_edited_plan_must_add_up(tmp_path, built) -> None:
    good = built.plan.model_dump(mode="json", by_alias=True)
    layer = next(iter(good["kept"]))
    for wrong in (
        {"uneven": False},
        {"action": "dense"},
        {"kept": good["kept"] | {layer: [0]}},
        {"kept": good["kept"] | {layer: [0, 1, 2]}},
    ):
        with pytest.raises(ConfigError, match="the plan cannot be used"):
            write_plan(tmp_path, json.dumps(good | wrong)).plan  # noqa: B018
