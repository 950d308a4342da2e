"""The compress stage: plan in, checkpoint out; the same bytes every time, also after a kill."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import ConfigError, InputRejected, MoeEdgeError
from moe_edge.families.loading import load_model
from moe_edge.stages import compress
from moe_edge.storage.files import sha256_file
from tests.compression.test_surgery import KEPT, plan_of
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


def test_a_killed_run_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_of(tmp_path, tiny_checkpoint(tmp_path, "qwen3_moe"))
    compress.run(context)
    first = {path.name: sha256_file(path) for path in (context.out / "model").iterdir()}

    def killed(*_arguments: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(compress, "reload_difference", killed)
        compress.run(context)
    (context.out / "model.tmp" / "leftover").write_text("from the killed run")
    compress.run(context)
    assert {path.name: sha256_file(path) for path in (context.out / "model").iterdir()} == first
    assert not (context.out / "model.tmp").exists()


def test_a_student_that_differs_is_not_delivered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_of(tmp_path, tiny_checkpoint(tmp_path, "mixtral"))
    monkeypatch.setattr(compress, "reload_difference", lambda *_arguments: 1e-3)
    with pytest.raises(MoeEdgeError, match="differs from the one in memory"):
        compress.run(context)
    assert not (context.out / "model").exists()


def test_the_reload_check_notices_a_changed_weight(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "olmoe")
    model = load_model(folder)
    assert compress.reload_difference(model, folder) == 0.0
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[0] += 0.1
    assert compress.reload_difference(model, folder) > 0.0


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
