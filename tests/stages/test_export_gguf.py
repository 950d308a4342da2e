"""The GGUF half of the export stage: dense students, parts, audited files, and what is refused before the first byte."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_edge.compression.surgery import apply_plan
from moe_edge.contracts.errors import ConfigError, InputRejected, MoeEdgeError
from moe_edge.contracts.plan import Plan
from moe_edge.exporting import gguf_quantize
from moe_edge.exporting import job as export_job
from moe_edge.exporting.imatrix import dense_imatrix, imatrix_arrays
from moe_edge.formulas.importance import mean_squares
from moe_edge.models.loading import load_model, save_student
from moe_edge.profiling.sums import to_statistics
from moe_edge.runtimes.gguf_header import check_gguf_header
from moe_edge.stages import export as stage
from moe_edge.storage.folders import changed_files, hash_folder
from moe_edge.storage.statistics import Statistics
from tests.compression.action_helpers import material, plan_of
from tests.exporting.gguf_models import representable
from tests.planning.plan_helpers import config
from tests.profiling.runs import whole_pass

KEPT = {0: [0, 2, 3, 5], 1: [0, 1, 4, 5]}
GGUF = ("export.formats=[gguf]", "target.context_length=64", "target.runtime.threads=1")


def profiled(teacher: Path, tmp_path: Path) -> Statistics:
    return to_statistics(whole_pass(teacher, tmp_path / "partial"), {"calibration_digest": "abc"})


def test_further_types_above_the_budget_of_bytes_are_left_out(tmp_path):
    model, wishes = representable(tmp_path, "olmoe"), config(*GGUF)
    settings = {"main": "Q4_K_M", "precision": "int4", "statistics": None, "kept": None, "provenance": {}}
    recipes = {
        limit: stage.plan_job(wishes, model, tmp_path / "out", **settings, limit_bytes=limit).recipes
        for limit in (None, 1)
    }
    assert recipes == {None: ("Q4_K_M", "Q8_0"), 1: ("Q4_K_M",)}


def job(model: Path, out: Path, *settings: str, statistics: Statistics | None = None, kept=None, main: str = "Q4_K_M"):
    return stage.plan_job(
        config(*GGUF, *settings), model, out, main=main, precision="int4", statistics=statistics, kept=kept,
        provenance={"method": "drop by ean"},
    )  # fmt: skip


def dense_student(tmp_path: Path, family: str) -> tuple[Path, Plan]:
    teacher = representable(tmp_path, family)
    plan = plan_of(KEPT, action="dense")
    model = load_model(teacher)
    applied = apply_plan(model, plan, material(model))
    save_student(applied.model, teacher, tmp_path / "student")
    return teacher, plan


@pytest.mark.parametrize(
    ("family", "down"), [("qwen2_moe", "blk.1.ffn_down.weight"), ("olmoe", "blk.1.ffn_down_exps.weight")]
)
def test_a_dense_student_is_exported_with_the_importance_of_its_experts(tmp_path, family, down):
    """As a dense class, which the shared expert joined, or with one expert where no class fits."""
    teacher, plan = dense_student(tmp_path, family)
    statistics = profiled(teacher, tmp_path)
    spec = job(tmp_path / "student", tmp_path / "out").spec
    own = dense_imatrix(statistics.imatrix, spec, plan.kept)
    experts = statistics.imatrix
    expected = mean_squares(experts["expert_down"][1], experts["expert_count"][1])[KEPT[1]].flatten()
    given = torch.from_numpy(imatrix_arrays(own, spec)[down])
    torch.testing.assert_close(given[: len(expected)], expected, rtol=1e-4, atol=0)
    shared = experts["shared_down"].shape[1] if family == "qwen2_moe" else 0
    assert len(given) == len(expected) + shared
    result = stage.export_model(
        job(tmp_path / "student", tmp_path / "out", statistics=replace(statistics, imatrix=own))
    )
    assert {row.quantization for row in result.artifacts} == {"Q4_K_M", "Q8_0"}
    assert result.parity[0]["passed"] and result.imatrix
    ending = "dense" if family == "qwen2_moe" else "1e"
    assert result.name.endswith(ending) and not result.notes


def test_a_narrowed_dense_student_has_no_importance_inside(tmp_path):
    teacher, plan = dense_student(tmp_path, "qwen3_moe")
    spec = replace(job(tmp_path / "student", tmp_path / "out").spec, dense_width=48)
    own = dense_imatrix(profiled(teacher, tmp_path).imatrix, spec, plan.kept)
    assert "dense_down" not in own and "blk.0.ffn_up.weight" in imatrix_arrays(own, spec)


def test_a_format_that_cannot_hold_a_dense_student_is_left_out_or_refused(tmp_path, monkeypatch):
    dense_student(tmp_path, "qwen3_moe")
    monkeypatch.setattr(export_job, "refusals", lambda runtime, _: ["no dense graphs"] if runtime == "ort" else [])
    settled = job(tmp_path / "student", tmp_path / "out", "export.formats=auto")
    assert settled.formats == ("gguf",) and settled.notes == ("onnx was left out: no dense graphs",)
    with pytest.raises(InputRejected, match="no dense graphs"):
        job(tmp_path / "student", tmp_path / "out", "export.formats=[onnx]")


def test_large_files_are_delivered_in_parts(tmp_path):
    model = representable(tmp_path, "qwen3_moe")
    wanted = job(model, tmp_path / "out", "export.gguf.split_bytes=60KB", "export.gguf.types=[Q4_K_M]")
    (row,) = stage.export_model(wanted).artifacts
    names = [Path(name).name for name in row.files]
    assert row.path == row.files[0] and names[0].endswith(f"-Q4_K_M-00001-of-{len(names):05d}.gguf")
    delivered = hash_folder(tmp_path / "out" / "gguf")
    assert sorted(delivered) == names and row.bytes == sum(entry.bytes for entry in delivered.values())
    assert max(entry.bytes for entry in delivered.values()) <= 60_000
    assert stage.export_model(wanted).artifacts == [row]  # a second run finds the parts
    (tmp_path / "out" / "gguf" / names[-1]).unlink()
    assert changed_files(tmp_path / "out" / "gguf", delivered) == [names[-1]]


def test_rows_tell_bits_and_fallbacks_and_files_tell_where_they_come_from(tmp_path):
    model = representable(tmp_path, "qwen3_moe")
    wanted = job(model, tmp_path / "out", "export.gguf.types=[Q4_K_M]", statistics=profiled(model, tmp_path))
    (row,) = stage.export_model(wanted).artifacts
    assert row.fallbacks == {"Q4_K -> Q5_0": 4, "Q5_K -> Q5_1": 2, "Q6_K -> Q8_0": 10}
    assert row.bits_per_weight_by_class["expert_gate"] == 5.5
    metadata = check_gguf_header(tmp_path / "out" / "gguf" / Path(row.path).name).metadata
    assert metadata["general.base_model.0.name"] == "demo-teacher"
    assert (metadata["moe_edge.method"], metadata["moe_edge.calibration_digest"]) == ("drop by ean", "abc")


def test_an_expert_tensor_that_stays_unquantized_fails_the_export(tmp_path, monkeypatch):
    """The quantizer is made to believe that this is the recipe, so that only the audit can tell."""
    real = gguf_quantize.pinned_types

    def lazy(*given):
        return real(*given) | {"blk.1.ffn_up_exps.weight": "F16"}

    monkeypatch.setattr(gguf_quantize, "pinned_types", lazy)
    model = representable(tmp_path, "qwen3_moe")
    with pytest.raises(MoeEdgeError, match=r"ffn_up_exps\.weight' \(expert_up\) is F16, 16\.00 bits per weight"):
        stage.export_model(job(model, tmp_path / "out"))


def test_types_that_need_a_profile_are_refused_before_the_first_byte(tmp_path):
    model = representable(tmp_path, "qwen3_moe", hidden=256, width=256, layers=1, experts=4)
    with pytest.raises(ConfigError, match="IQ2_XXS needs an importance matrix"):
        stage.export_model(job(model, tmp_path / "out", "export.gguf.types=[Q8_0, IQ2_XXS]"))
    with pytest.raises(ConfigError, match="parts of 100.0 KiB are too small"):
        stage.export_model(job(model, tmp_path / "out", "export.gguf.split_bytes=100KiB", "export.gguf.types=[Q8_0]"))
    assert not (tmp_path / "out").exists()
    mix = {"expert_down": "IQ2_XXS"}  # a plan's own types, in a recipe that needs nothing
    with pytest.raises(ConfigError, match="Q8_0 needs an importance matrix"):
        stage.export_model(replace(job(model, tmp_path / "out", "export.gguf.types=[Q8_0]"), mix=mix))
    known = profiled(model, tmp_path)
    mixed = replace(job(model, tmp_path / "mix", "export.gguf.types=[Q8_0]", statistics=known), mix=mix)
    (row,) = stage.export_model(mixed).artifacts
    assert (row.quantization, row.bits_per_weight_by_class["expert_down"]) == ("Q8_0-mix", 2.062)
    job_ = job(model, tmp_path / "out", "export.gguf.types=[IQ2_XXS]", statistics=known)
    (row,) = stage.export_model(job_).artifacts
    assert row.bits_per_weight_by_class["expert_up"] == 2.062
