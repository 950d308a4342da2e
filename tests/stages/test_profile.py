"""The profile stage on a tiny teacher: its files, its summary, resuming after a kill, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.config_io import resolve_config
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.targets_io import read_target
from moe_edge.profiling import passes
from moe_edge.stages import profile
from moe_edge.storage.checkpoint import checkpoint_digest
from moe_edge.storage.folders import hash_folder
from moe_edge.storage.logits import LogitCache
from moe_edge.storage.rows import TokenRows
from moe_edge.storage.statistics import Statistics
from tests.tiny import tiny_checkpoint

FILES = ["calibration.json", "imatrix.gguf", "logits.h5", "rows.safetensors", "statistics.safetensors"]


def _config(**profile_keys: Any) -> BuildConfig:
    flags = {
        "calibration": {"tokens": 640, "sequence_length": 32},
        "profile": {"cka_tokens": 128, "logits": {"k": 8}} | profile_keys,
    }
    return resolve_config(read_target("cpu"), flags=flags)


def _context(tmp_path: Path, out: str = "profile", config: BuildConfig | None = None) -> StageContext:
    teacher = tmp_path / "tiny-qwen2_moe"
    if not teacher.exists():
        tiny_checkpoint(tmp_path, "qwen2_moe")
    (tmp_path / out).mkdir(exist_ok=True)
    return StageContext(config or _config(), teacher, checkpoint_digest(teacher), tmp_path / out)


def test_everything_is_written_and_fits_together(tmp_path: Path) -> None:
    context = _context(tmp_path)
    summary = profile.run(context)
    assert sorted(path.name for path in context.out.iterdir()) == FILES
    rows, statistics = TokenRows.load(context.out / FILES[3]), Statistics.load(context.out / FILES[4])
    assert rows.ids_NS.shape == (20, 32) and statistics.tokens == 640 and statistics.cka_tokens == 128
    assert statistics.counts_LE.sum(-1).tolist() == [1280, 1280]
    assert statistics.meta["teacher_digest"] == context.teacher_digest
    assert statistics.meta["calibration_digest"] == rows.digest
    with LogitCache(
        context.out / "logits.h5", {"teacher": context.teacher_digest, "calibration": rows.digest}
    ) as cache:
        assert len(cache) == 20 and cache.temperatures == (1, 1.5, 2, 3, 4)
        assert cache.row(rows.ids_NS[7]).indices_SK.shape == (32, 8)
    assert summary["tokens"] == 640 and summary["rows"] == 20
    assert len(summary["mean_cka"]) == len(summary["sink_share"]) == len(summary["dead_experts"]) == 2
    assert "note" not in summary


def test_a_killed_stage_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed = _context(tmp_path, "whole"), _context(tmp_path, "killed")
    summary = profile.run(whole)
    saves = []

    def dying_save(*arguments: Any) -> None:
        save(*arguments)
        saves.append(1)
        if len(saves) == 2:
            raise KeyboardInterrupt

    save = passes.save_tensors
    monkeypatch.setattr(passes, "save_tensors", dying_save)
    with pytest.raises(KeyboardInterrupt):
        profile.run(killed)
    monkeypatch.undo()
    assert profile.run(killed) == summary
    assert hash_folder(killed.out) == hash_folder(whole.out)


def test_without_cka_and_with_little_text(tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("A short text of one's own. " * 40, encoding="utf-8")
    config = _config(cka_tokens=0)
    config = config.model_copy(
        update={"calibration": config.calibration.model_copy(update={"recipe": str(text), "tokens": 9999})}
    )
    summary = profile.run(_context(tmp_path, config=config))
    assert "of the 9999 tokens" in summary["note"]
    assert summary["mean_cka"] == [None, None] and summary["cka_tokens"] == 0
    assert str(tmp_path) not in (tmp_path / "profile" / "calibration.json").read_text()


def test_layerwise_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"layerwise(.|\n)*available: whole, auto"):
        profile.run(_context(tmp_path, config=_config(mode="layerwise")))


def test_rows_beyond_the_context_are_refused(tmp_path: Path) -> None:
    config = _config()
    config = config.model_copy(update={"calibration": config.calibration.model_copy(update={"sequence_length": 512})})
    with pytest.raises(ConfigError, match="at most 256 tokens"):
        profile.run(_context(tmp_path, config=config))
