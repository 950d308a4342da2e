"""The profile stage on a tiny teacher: its files, its summary, resuming after a kill, and what it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from moe_edge.contracts.artifacts import ProfileSummary
from moe_edge.contracts.checkpoint import Teacher
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.config_io import resolve_config
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.targets_io import read_target
from moe_edge.formulas.cka import cka_from_hsic
from moe_edge.models.loading import load_model, load_tokenizer
from moe_edge.process import placement
from moe_edge.process.placement import DECIDED
from moe_edge.profiling import sums
from moe_edge.profiling.summary import profile_summary
from moe_edge.stages import profile
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.folders import hash_folder
from moe_edge.storage.logits import LogitCache
from moe_edge.storage.rows import TokenRows
from moe_edge.storage.statistics import TENSOR_FIELDS, Statistics
from tests.stages.inputs import opened
from tests.tiny import TOKENIZER_SIZE, tiny_checkpoint

FILES = ["calibration.json", "imatrix.gguf", "logits.h5", "rows.safetensors", "statistics.safetensors"]


def _config(**profile_keys: Any) -> BuildConfig:
    flags = {
        "calibration": {"tokens": 640, "sequence_length": 32},
        "profile": {"cka_tokens": 128, "logits": {"k": 8}} | profile_keys,
    }
    return resolve_config(read_target("cpu"), flags=flags)


class Call(NamedTuple):
    """The arguments of the stage."""

    config: BuildConfig
    teacher: Teacher
    out: Path


def _call(tmp_path: Path, out: str = "profile", config: BuildConfig | None = None) -> Call:
    teacher = tmp_path / "tiny-qwen2_moe"
    if not teacher.exists():
        tiny_checkpoint(tmp_path, "qwen2_moe")
    (tmp_path / out).mkdir(exist_ok=True)
    return Call(config or _config(), opened(teacher), tmp_path / out)


def run(call: Call) -> ProfileSummary:
    summary = profile.run(*call)
    assert summary is not None
    return summary


def test_everything_is_written_and_fits_together(tmp_path: Path) -> None:
    call = _call(tmp_path)
    summary = run(call)
    assert sorted(path.name for path in call.out.iterdir()) == [DECIDED, *FILES]
    rows, statistics = TokenRows.load(call.out / FILES[3]), Statistics.load(call.out / FILES[4])
    assert rows.ids_NS.shape == (20, 32) and statistics.tokens == 640 and statistics.cka_tokens == 128
    assert statistics.counts_LE.sum(-1).tolist() == [1280, 1280]
    assert statistics.meta["teacher_digest"] == call.teacher.digest
    assert statistics.meta["calibration_digest"] == rows.digest
    with LogitCache(call.out / "logits.h5", {"teacher": call.teacher.digest, "calibration": rows.digest}) as cache:
        assert len(cache) == 20 and cache.temperatures == (1, 1.5, 2, 3, 4)
        assert cache.row(rows.ids_NS[7]).indices_SK.shape == (32, 8)
    assert summary.tokens == 640 and summary.rows == 20
    assert len(summary.mean_cka) == len(summary.sink_share) == len(summary.no_evidence) == 2
    assert summary.mode == "whole" and summary.dtype == "float32" and summary.moe_layers == [0, 1]
    for mean, interval, null in zip(summary.mean_cka, summary.mean_cka_ci95, summary.cka_null, strict=True):
        assert interval is not None and interval[0] < mean < interval[1] and abs(null) < 0.2
    assert sum(len(ids) for ids in summary.super_experts) == 1  # of twelve
    assert summary.note is None


def test_a_padded_head_is_cut_to_the_tokenizers_vocabulary(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen2_moe", vocab=TOKENIZER_SIZE + 60)
    true = len(load_tokenizer(folder))
    assert true < inspect_checkpoint(folder).config["vocab_size"]
    call = _call(tmp_path)
    run(call)
    rows = TokenRows.load(call.out / "rows.safetensors")
    with LogitCache(call.out / "logits.h5", {"teacher": call.teacher.digest}) as cache:
        assert cache.codec.vocab == true and cache.row(rows.ids_NS[3]).indices_SK.max() < true
    model = load_model(folder)
    with torch.no_grad():
        logits_SV = model(torch.from_numpy(rows.ids_NS[3])[None].long()).logits[0, :, :true]
    best_S = logits_SV.log_softmax(-1).max(-1).values
    with LogitCache(call.out / "logits.h5", {"teacher": call.teacher.digest}) as cache:
        kept_S = torch.as_tensor(cache.row(rows.ids_NS[3]).logprobs_SK).max(-1).values
    torch.testing.assert_close(kept_S.float(), best_S, atol=0.05, rtol=0)


def test_a_killed_stage_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed = _call(tmp_path, "whole"), _call(tmp_path, "killed")
    summary = run(whole)
    saves = []

    def dying_save(*arguments: Any) -> None:
        save(*arguments)
        saves.append(1)
        if len(saves) == 2:
            raise KeyboardInterrupt

    save = sums.save_tensors
    monkeypatch.setattr(sums, "save_tensors", dying_save)
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    monkeypatch.undo()
    assert run(killed) == summary
    assert hash_folder(killed.out) == hash_folder(whole.out)


def test_without_cka_and_with_little_text(tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("A short text of one's own. " * 40, encoding="utf-8")
    config = _config(cka_tokens=0)
    config = config.model_copy(
        update={"calibration": config.calibration.model_copy(update={"recipe": str(text), "tokens": 9999})}
    )
    summary = run(_call(tmp_path, config=config))
    assert "of the 9999 tokens" in summary.note
    assert summary.mean_cka == [None, None] and summary.cka_tokens == 0
    assert str(tmp_path) not in (tmp_path / "profile" / "calibration.json").read_text()


def test_layer_by_layer_gives_the_same_statistics_and_logits(tmp_path: Path) -> None:
    whole = _call(tmp_path, "whole", _config(mode="whole"))
    layered = _call(tmp_path, "layered", _config(mode="layerwise"))
    expected, found = run(whole), run(layered)
    assert (found.mode, expected.mode) == ("layerwise", "whole")
    assert found.model_copy(update={"mode": "whole"}) == expected
    one, other = (Statistics.load(call.out / FILES[4]) for call in (whole, layered))
    for name in TENSOR_FIELDS:
        scale = float(getattr(one, name).abs().max())
        torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-5, atol=1e-5 * scale, msg=name)
    assert one.imatrix.keys() == other.imatrix.keys()
    with LogitCache(whole.out / "logits.h5") as caches, LogitCache(layered.out / "logits.h5") as others:
        assert caches.keys == others.keys
        for ids_S in TokenRows.load(whole.out / FILES[3]).ids_NS:
            first, second = caches.row(ids_S), others.row(ids_S)
            assert np.array_equal(first.indices_SK, second.indices_SK)
            np.testing.assert_allclose(first.logprobs_SK, second.logprobs_SK, atol=1e-5)


def test_auto_reads_layer_by_layer_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = _call(tmp_path, "little")
    needed = sum(info.bytes for info in inspect_checkpoint(call.teacher.path).tensors.values())
    monkeypatch.setattr(placement, "free_memory_bytes", lambda: int(needed / 0.6) - 1)
    assert run(call).mode == "layerwise"
    call = _call(tmp_path, "enough")
    monkeypatch.setattr(placement, "free_memory_bytes", lambda: int(needed / 0.6) + 9)
    assert run(call).mode == "whole"


def test_a_resumed_pass_keeps_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = _call(tmp_path)
    monkeypatch.setattr(placement, "free_memory_bytes", lambda: 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(profile, "profile_summary", lambda *_: None)
        patch.setattr(profile, "run_layerwise", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        run(call)
    monkeypatch.setattr(placement, "free_memory_bytes", lambda: 2**40)
    assert run(call).mode == "layerwise"


def test_unrouted_experts_are_no_evidence_and_no_similarity(tmp_path: Path) -> None:
    call = _call(tmp_path)
    before = run(call)
    statistics, rows = Statistics.load(call.out / FILES[4]), TokenRows.load(call.out / FILES[3])
    counts_LE, hsic_LEE = statistics.counts_LE.clone(), statistics.hsic_LEE.clone()
    counts_LE[1, [0, 3]] = 0
    hsic_LEE[:, 3, :] = hsic_LEE[:, :, 3] = 1e6  # whatever is said about them
    summary = profile_summary(replace(statistics, counts_LE=counts_LE, hsic_LEE=hsic_LEE), rows)
    assert summary.no_evidence == [[], [0, 3]]
    others = [1, 2, 4, 5]
    expected = cka_from_hsic(statistics.hsic_LEE[1][others][:, others])[~torch.eye(4, dtype=torch.bool)].mean()
    assert summary.mean_cka[1] == pytest.approx(float(expected), abs=1e-6)
    assert summary.mean_cka[0] != before.mean_cka[0]
    nothing = profile_summary(replace(statistics, counts_LE=torch.zeros_like(counts_LE)), rows)
    for name in ("mean_cka", "mean_cka_ci95", "cka_null", "mean_gated_cka"):
        assert getattr(nothing, name) == [None, None]


def test_rows_beyond_the_context_are_refused(tmp_path: Path) -> None:
    config = _config()
    config = config.model_copy(update={"calibration": config.calibration.model_copy(update={"sequence_length": 512})})
    with pytest.raises(ConfigError, match="at most 256 tokens"):
        run(_call(tmp_path, config=config))
