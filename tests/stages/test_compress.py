"""The compress stage: plan in, checkpoint out; the same bytes every time, also after a kill."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_edge.compression import on_disk, student
from moe_edge.compression.surgery import apply_plan
from moe_edge.contracts.artifacts import CompressSummary, PlanFolder, ProfileFolder
from moe_edge.contracts.checkpoint import Teacher
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import ConfigError, InputRejected, MoeEdgeError, ResourceProblem
from moe_edge.contracts.plan import Plan
from moe_edge.models.loading import load_model
from moe_edge.models.students import load_student
from moe_edge.process.placement import DECIDED
from moe_edge.stages import compress
from moe_edge.storage.files import sha256_file
from tests.compression.action_helpers import KEPT, plan_of
from tests.planning.plan_helpers import config
from tests.stages.inputs import measured_statistics, opened, plain_statistics, random_rows, write_plan, write_profile
from tests.tiny import tiny_checkpoint, tiny_ids

PRECISIONS = (
    ("qwen3_moe", torch.bfloat16),
    ("qwen2_moe", torch.float32),
    ("mixtral", torch.bfloat16),
    ("olmoe", torch.float32),
)


class Call(NamedTuple):
    """The arguments of the stage."""

    config: BuildConfig
    teacher: Teacher
    out: Path
    profile: ProfileFolder
    plan: PlanFolder

    def run(self) -> CompressSummary:
        return compress.run(self.config, self.teacher, self.out, profile=self.profile, plan=self.plan)

    @property
    def beside_model(self) -> set[str]:
        """What the stage wrote beside model/."""
        names = {path.name for path in self.out.iterdir()}
        assert names >= {"model", DECIDED}
        return names - {"model", DECIDED}


def call_of(tmp_path: Path, teacher: Path, plan: Plan | str | None = None, *, measured: bool = False) -> Call:
    """A plan (by default one that drops experts) and a profile of three rows, the last of which judged the plan.

    Args:
        measured: are the profile's sums those of this teacher?
    """
    (tmp_path / "out").mkdir(exist_ok=True)
    ids_NS = random_rows(3, 32)
    statistics = measured_statistics(teacher, ids_NS) if measured else plain_statistics(experts=6)
    profile = write_profile(tmp_path / "profile", statistics, ids_NS)
    plans = write_plan(tmp_path / "plan", plan_of(KEPT) if plan is None else plan)
    return Call(config("plan.tokens=32"), opened(teacher), tmp_path / "out", profile, plans)


@pytest.mark.parametrize(("family", "dtype"), PRECISIONS)
def test_the_student_and_its_summary(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    call = call_of(tmp_path, tiny_checkpoint(tmp_path, family, dtype=dtype))
    summary = call.run()
    found, teacher = summary.student, summary.teacher
    weights = load_file(call.out / "model" / "model.safetensors")
    assert found.params_total == sum(tensor.numel() for tensor in weights.values())
    assert found.bytes == found.params_total * dtype.itemsize
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert (found.experts, found.top_k, found.reload_max_difference, found.action) == (4, 2, 0.0, "drop")
    assert teacher.experts == 6
    assert teacher.params_total - found.params_total == 2 * 2 * (3 * 64 * 32 + 64)
    assert found.params_active == teacher.params_active - 2 * 2 * 64  # router rows only
    assert call.beside_model == set()
    assert CompressSummary.model_validate_json(summary.model_dump_json()) == summary
    with torch.no_grad():
        assert load_model(call.out / "model")(tiny_ids()).logits.isfinite().all()


def test_routing_is_counted_on_the_last_rows(tmp_path: Path) -> None:
    """And only where student and teacher have routers that can be compared."""
    teacher = tiny_checkpoint(tmp_path, "qwen3_moe")
    health = call_of(tmp_path, teacher).run().routing_health
    assert health is not None and health.tokens == 3 * 32, "all three rows, which are fewer than it takes"
    assert [row["layer"] for row in health.layers] == [0, 1]
    dense = call_of(tmp_path, teacher, plan_of(KEPT, action="dense"), measured=True)
    assert dense.run().routing_health is None


ACTIONS = {
    "merge": {"action": "merge", "merges": {0: {1: 0, 4: 3}, 1: {0: 1, 5: 4}}},
    "shared-core": {"action": "shared-core", "shared_rank": 3},
    "dense": {"action": "dense"},
    "narrow": {"expert_width": 32},
    "refit": {"compensate": True, "sequential": True, "top_k": 1},
}
BESIDE = {
    "merge": {"merges.json", "layers.json", "imatrix.safetensors"},
    "shared-core": {"shared_core", "layers.json", "imatrix.safetensors"},
    "dense": {"layers.json"},
    "narrow": {"layers.json", "imatrix.safetensors"},
    "refit": {"layers.json", "imatrix.safetensors"},
}


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.bfloat16) for name in ACTIONS), ("refit", torch.float32)])
def test_every_action_is_saved_and_reloads(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    teacher = tiny_checkpoint(tmp_path, "qwen2_moe", width=64, dtype=dtype)
    plan = plan_of(KEPT, **ACTIONS[name])
    call = call_of(tmp_path, teacher, plan, measured=True)
    found = call.run().student
    assert found.reload_max_difference == 0.0
    weights = load_file(call.out / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert found.params_total == sum(tensor.numel() for tensor in weights.values())
    reloaded = AutoModelForCausalLM.from_pretrained(call.out / "model").eval()
    with torch.no_grad():
        assert reloaded(tiny_ids()).logits.isfinite().all()
    assert call.beside_model == BESIDE[name]
    if name == "merge":
        pairs = json.loads((call.out / "merges.json").read_text())
        assert [(pair["layer"], pair["dropped"]) for pair in pairs] == [(0, 1), (0, 4), (1, 0), (1, 5)]
        assert found.pairs_proposed == 4 and found.pairs_merged == sum(pair["accepted"] for pair in pairs)
    if name == "dense":
        assert (found.family, found.experts) == ("qwen2", 1)
    else:
        assert (found.experts, found.top_k) == (4, plan.top_k)


def test_a_shared_core_leaves_a_trainable_form_that_gives_the_same_logits(tmp_path: Path) -> None:
    teacher = tiny_checkpoint(tmp_path, "olmoe")
    call = call_of(tmp_path, teacher, plan_of(KEPT, **ACTIONS["shared-core"]), measured=True)
    call.run()
    trainable, plain = load_student(call.out / "shared_core"), load_student(call.out / "model")
    with torch.no_grad():
        assert float((trainable(tiny_ids()).logits - plain(tiny_ids()).logits).abs().max()) < 1e-5
    assert (call.out / "shared_core" / "modeling_shared_core.py").is_file()
    call_of(tmp_path, teacher).run()
    assert call.beside_model == set(), "nothing of the other action is left"


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000, total=1000))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_a_teacher_larger_than_memory_is_dropped_on_disk(
    tmp_path: Path, family: str, no_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_checkpoint(tmp_path, family)
    monkeypatch.setattr(compress, "load_model", lambda *_a, **_k: pytest.fail("loaded the teacher"))
    call = call_of(tmp_path, teacher, plan_of(KEPT, top_k=1))
    found = call.run().student
    assert (found.experts, found.top_k, found.reload_max_difference) == (4, 1, 0.0)
    assert found.parts_compared > 2 * 4
    model = load_model(teacher)
    apply_plan(model, plan_of(KEPT, top_k=1))
    with torch.no_grad():
        assert torch.equal(load_student(call.out / "model")(tiny_ids()).logits, model(tiny_ids()).logits)


def test_a_streamed_profile_drops_on_disk_and_a_resumed_stage_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_checkpoint(tmp_path, "qwen3_moe")
    call = call_of(tmp_path, teacher)._replace(config=config("profile.mode=layerwise"))
    assert "parts_compared" in call.run().student.model_dump()
    with monkeypatch.context() as patch:
        patch.setattr(compress, "load_model", lambda *_a, **_k: pytest.fail("loaded the teacher"))
        call._replace(config=config()).run()
    (call.out / DECIDED).unlink()
    assert "parts_compared" not in call._replace(config=config()).run().student.model_dump()


def test_a_wrong_byte_on_disk_is_noticed(tmp_path: Path, no_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(tmp_path, tiny_checkpoint(tmp_path, "qwen3_moe"))
    write = on_disk.stream_pruned_checkpoint

    def damaged(*arguments: object, **options: object) -> None:
        write(*arguments, **options)  # type: ignore[arg-type]
        path = Path(str(arguments[-1])) / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(on_disk, "stream_pruned_checkpoint", damaged)
    with pytest.raises(MoeEdgeError, match="differs from the teacher"):
        call.run()
    assert not (call.out / "model").exists()


@pytest.mark.parametrize("changes", [{"compensate": True}, {"expert_width": 32}, {"action": "dense"}])
def test_what_needs_the_whole_model_is_refused_without_memory(
    tmp_path: Path, no_memory: None, changes: dict[str, object]
) -> None:
    call = call_of(tmp_path, tiny_checkpoint(tmp_path, "qwen3_moe", width=64), plan_of(KEPT, **changes))
    with pytest.raises(ResourceProblem, match="does not fit in memory") as caught:
        call.run()
    assert caught.value.exit_code == 6
    assert not any(call.out.iterdir()), "the same command works once there is memory"


def test_a_killed_run_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(tmp_path, tiny_checkpoint(tmp_path, "qwen3_moe"))
    call.run()
    first = {path.name: sha256_file(path) for path in (call.out / "model").iterdir()}

    def killed(*_arguments: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(student, "reload_difference", killed)
        call.run()
    (call.out / "model.tmp" / "leftover").write_text("from the killed run")
    call.run()
    assert {path.name: sha256_file(path) for path in (call.out / "model").iterdir()} == first
    assert not (call.out / "model.tmp").exists()


def test_a_student_that_differs_is_not_delivered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(tmp_path, tiny_checkpoint(tmp_path, "mixtral"))
    monkeypatch.setattr(student, "reload_difference", lambda *_arguments: 1e-3)
    with pytest.raises(MoeEdgeError, match="differs from the one in memory"):
        call.run()
    assert not (call.out / "model").exists()


def test_the_reload_check_notices_a_changed_weight(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "olmoe")
    model = load_model(folder)
    assert student.reload_difference(model, folder) == 0.0
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[0] += 0.1
    assert student.reload_difference(model, folder) > 0.0


@pytest.mark.parametrize(
    ("plan_text", "word"),
    [
        ("{", "plan cannot be used"),
        (plan_of(KEPT).to_json().replace('"top_k": 2', '"top_k": 5'), "top_k 5 exceeds the 4 kept experts"),
        (plan_of(KEPT, experts_total=8).to_json(), "belongs to another model"),
    ],
)
def test_a_bad_plan_stops_before_any_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan_text: str, word: str
) -> None:
    call = call_of(tmp_path, tiny_checkpoint(tmp_path, "qwen3_moe"), plan_text)
    monkeypatch.setattr(compress, "load_model", lambda *_a, **_k: pytest.fail("read the weights"))
    with pytest.raises(ConfigError, match=word) as caught:
        call.run()
    assert caught.value.exit_code == 2 and not any(call.out.iterdir())


def test_a_missing_plan_is_a_usage_error(tmp_path: Path) -> None:
    call = call_of(tmp_path, tiny_checkpoint(tmp_path, "qwen3_moe"))
    call.plan.document.unlink()
    with pytest.raises(ConfigError, match="there is no plan"):
        call.run()


def test_a_teacher_without_a_tokenizer_is_rejected(tmp_path: Path) -> None:
    teacher = tiny_checkpoint(tmp_path, "qwen3_moe", with_tokenizer=False)
    with pytest.raises(InputRejected, match="tokenizer is missing"):
        call_of(tmp_path, teacher).run()
