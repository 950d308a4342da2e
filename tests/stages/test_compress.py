"""The compress stage: plan in, checkpoint out; the same bytes every time, also after a kill."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_edge.compression import on_disk as streamed
from moe_edge.compression import student
from moe_edge.compression.surgery import apply_plan
from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import ConfigError, InputRejected, MoeEdgeError, ResourceProblem
from moe_edge.models.loading import load_model
from moe_edge.models.students import load_student
from moe_edge.stages import compress
from moe_edge.storage.files import sha256_file
from tests.compression.action_helpers import KEPT, material, plan_of
from tests.tiny import FAMILY_NAMES, tiny_checkpoint, tiny_ids


def context_of(tmp_path: Path, teacher: Path, plan_text: str | None = None) -> StageContext:
    """A context with a plan folder; the stage reads no configuration."""
    (tmp_path / "plan").mkdir(exist_ok=True)
    (tmp_path / "plan" / "plan.json").write_text(plan_of(KEPT).to_json() if plan_text is None else plan_text)
    (tmp_path / "out").mkdir(exist_ok=True)
    config = BuildConfig.model_construct()
    return StageContext(config, teacher, "digest", tmp_path / "out", {"plan": tmp_path / "plan"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_student_and_its_summary(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    teacher = tiny_checkpoint(tmp_path, family, dtype=dtype)
    summary = compress.run(context_of(tmp_path, teacher))
    student = tmp_path / "out" / "model"
    weights = load_file(student / "model.safetensors")
    assert summary["params_total"] == sum(tensor.numel() for tensor in weights.values())
    assert summary["bytes"] == summary["params_total"] * dtype.itemsize
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert (summary["experts"], summary["top_k"], summary["reload_max_difference"]) == (4, 2, 0.0)
    assert summary["teacher"]["experts"] == 6
    assert summary["teacher"]["params_total"] - summary["params_total"] == 2 * 2 * (3 * 64 * 32 + 64)
    assert summary["params_active"] == summary["teacher"]["params_active"] - 2 * 2 * 64  # router rows only
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]
    assert json.dumps(summary)
    with torch.no_grad():
        assert load_model(student)(tiny_ids()).logits.isfinite().all()


def with_rows(monkeypatch: pytest.MonkeyPatch, teacher: Path) -> None:
    """Give the stage what a profile would have told it."""
    given = material(load_model(teacher))
    monkeypatch.setattr(compress, "material_of", lambda plan, context: given)


ACTIONS = {
    "merge": {"action": "merge", "merges": {0: {1: 0, 4: 3}, 1: {0: 1, 5: 4}}},
    "shared-core": {"action": "shared-core", "shared_rank": 3},
    "dense": {"action": "dense"},
    "narrow": {"expert_width": 32},
    "refit": {"compensate": True, "sequential": True, "top_k": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIONS)
def test_every_action_is_saved_and_reloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    teacher = tiny_checkpoint(tmp_path, "qwen2_moe", width=64, dtype=dtype)
    with_rows(monkeypatch, teacher)
    plan = plan_of(KEPT, **ACTIONS[name])
    summary = compress.run(context_of(tmp_path, teacher, plan.to_json()))
    out = tmp_path / "out"
    assert summary["reload_max_difference"] == 0.0 and json.dumps(summary)
    weights = load_file(out / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert summary["params_total"] == sum(tensor.numel() for tensor in weights.values())
    student = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    with torch.no_grad():
        assert student(tiny_ids()).logits.isfinite().all()
    beside = {path.name for path in out.iterdir()} - {"model"}
    expected = {
        "merge": {"merges.json", "layers.json", "imatrix.safetensors"},
        "shared-core": {"shared_core", "layers.json", "imatrix.safetensors"},
        "dense": {"layers.json"},
    }
    assert beside == expected.get(name, {"layers.json", "imatrix.safetensors"})
    if name == "merge":
        pairs = json.loads((out / "merges.json").read_text())
        assert [(pair["layer"], pair["dropped"]) for pair in pairs] == [(0, 1), (0, 4), (1, 0), (1, 5)]
        assert summary["pairs_proposed"] == 4
    if name == "dense":
        assert (summary["family"], summary["experts"]) == ("qwen2", 1)
    else:
        assert (summary["experts"], summary["top_k"]) == (4, plan.top_k)


def test_a_shared_core_leaves_a_trainable_form_that_gives_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_checkpoint(tmp_path, "olmoe")
    with_rows(monkeypatch, teacher)
    context = context_of(tmp_path, teacher, plan_of(KEPT, **ACTIONS["shared-core"]).to_json())
    compress.run(context)
    trainable, plain = load_student(context.out / "shared_core"), load_student(context.out / "model")
    with torch.no_grad():
        assert float((trainable(tiny_ids()).logits - plain(tiny_ids()).logits).abs().max()) < 1e-5
    assert (context.out / "shared_core" / "modeling_shared_core.py").is_file()
    (context.inputs["plan"] / "plan.json").write_text(plan_of(KEPT).to_json())
    compress.run(context)
    assert [path.name for path in context.out.iterdir()] == ["model"]  # nothing of the other action is left


@pytest.mark.parametrize("changes", [ACTIONS["merge"], ACTIONS["narrow"]])
def test_an_action_without_a_profile_says_what_it_needs(tmp_path: Path, changes: dict[str, object]) -> None:
    context = context_of(tmp_path, tiny_checkpoint(tmp_path, "qwen3_moe", width=64), plan_of(KEPT, **changes).to_json())
    with pytest.raises(ConfigError, match="needs a profile"):
        compress.run(context)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000, total=1000))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_a_teacher_larger_than_memory_is_dropped_on_disk(
    tmp_path: Path, family: str, no_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_checkpoint(tmp_path, family)
    monkeypatch.setattr(compress, "load_model", lambda *_a, **_k: pytest.fail("loaded the teacher"))
    context = context_of(tmp_path, teacher, plan_of(KEPT, top_k=1).to_json())
    summary = compress.run(context)
    assert (summary["experts"], summary["top_k"], summary["reload_max_difference"]) == (4, 1, 0.0)
    assert summary["parts_compared"] > 2 * 4
    model = load_model(teacher)
    apply_plan(model, plan_of(KEPT, top_k=1))
    with torch.no_grad():
        assert torch.equal(load_student(context.out / "model")(tiny_ids()).logits, model(tiny_ids()).logits)


def test_a_wrong_byte_on_disk_is_noticed(tmp_path: Path, no_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_of(tmp_path, tiny_checkpoint(tmp_path, "qwen3_moe"))
    write = streamed.stream_pruned_checkpoint

    def damaged(*arguments: object, **options: object) -> None:
        write(*arguments, **options)  # type: ignore[arg-type]
        path = Path(str(arguments[-1])) / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(streamed, "stream_pruned_checkpoint", damaged)
    with pytest.raises(MoeEdgeError, match="differs from the teacher"):
        compress.run(context)
    assert not (context.out / "model").exists()


@pytest.mark.parametrize("changes", [{"compensate": True}, {"expert_width": 32}, {"action": "dense"}])
def test_what_needs_the_whole_model_is_refused_without_memory(
    tmp_path: Path, no_memory: None, changes: dict[str, object]
) -> None:
    context = context_of(tmp_path, tiny_checkpoint(tmp_path, "qwen3_moe", width=64), plan_of(KEPT, **changes).to_json())
    with pytest.raises(ResourceProblem, match="does not fit in memory") as caught:
        compress.run(context)
    assert caught.value.exit_code == 6 and not (context.out / "model").exists()


def test_a_killed_run_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_of(tmp_path, tiny_checkpoint(tmp_path, "qwen3_moe"))
    compress.run(context)
    first = {path.name: sha256_file(path) for path in (context.out / "model").iterdir()}

    def killed(*_arguments: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(student, "reload_difference", killed)
        compress.run(context)
    (context.out / "model.tmp" / "leftover").write_text("from the killed run")
    compress.run(context)
    assert {path.name: sha256_file(path) for path in (context.out / "model").iterdir()} == first
    assert not (context.out / "model.tmp").exists()


def test_a_student_that_differs_is_not_delivered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_of(tmp_path, tiny_checkpoint(tmp_path, "mixtral"))
    monkeypatch.setattr(student, "reload_difference", lambda *_arguments: 1e-3)
    with pytest.raises(MoeEdgeError, match="differs from the one in memory"):
        compress.run(context)
    assert not (context.out / "model").exists()


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
    context = context_of(tmp_path, tiny_checkpoint(tmp_path, "qwen3_moe"), plan_text)
    monkeypatch.setattr(compress, "load_model", lambda *_a, **_k: pytest.fail("read the weights"))
    with pytest.raises(ConfigError, match=word) as caught:
        compress.run(context)
    assert caught.value.exit_code == 2 and not any(context.out.iterdir())


def test_a_missing_plan_is_a_usage_error(tmp_path: Path) -> None:
    context = context_of(tmp_path, tiny_checkpoint(tmp_path, "qwen3_moe"))
    (tmp_path / "plan" / "plan.json").unlink()
    with pytest.raises(ConfigError, match="there is no plan"):
        compress.run(context)


def test_a_teacher_without_a_tokenizer_is_rejected(tmp_path: Path) -> None:
    teacher = tiny_checkpoint(tmp_path, "qwen3_moe", with_tokenizer=False)
    with pytest.raises(InputRejected, match="tokenizer is missing"):
        compress.run(context_of(tmp_path, teacher))
