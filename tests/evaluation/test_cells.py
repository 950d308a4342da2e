"""Cells: what is measured again and what is not, failures that stay with their model, and the planned KV cache."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_edge.contracts.errors import InputRejected
from moe_edge.evaluation import cells
from moe_edge.evaluation.cells import measure_quality, measure_speed, model_digest
from tests.evaluation.fakes import VOCAB, Opener, new_session, some_models


def test_a_rerun_takes_finished_qualities_and_repeats_only_failures(tmp_path: Path) -> None:
    teacher, student, files = some_models(tmp_path, "good.gguf", "broken.gguf")
    first = measure_quality(new_session(tmp_path / "out", Opener()), teacher, student, files)
    again, third = Opener(), Opener()
    assert measure_quality(new_session(tmp_path / "out", again), teacher, student, files) == first
    assert again.opened == ["teacher", "hf", "broken.gguf"]
    files[1].location.write_bytes(b"GGUF")
    measure_quality(new_session(tmp_path / "out", third), teacher, student, files)
    assert "good.gguf" not in third.opened and "broken.gguf" in third.opened


def test_a_rerun_takes_finished_speeds_unless_it_must_not(tmp_path: Path) -> None:
    teacher, student, files = some_models(tmp_path, "good.gguf", "killed.gguf")
    wanted = [*files, student, teacher]
    first = measure_speed(new_session(tmp_path / "out", Opener()), wanted)
    assert len(list((tmp_path / "out" / "raw").iterdir())) == 3, "of all but the one that was killed"
    again = new_session(tmp_path / "out", Opener())
    assert [cell.speed for cell in measure_speed(again, wanted)] == [cell.speed for cell in first]
    assert again.transport.measured == ["killed.gguf"]
    anew = new_session(tmp_path / "out", Opener(), reuse=False)
    measure_speed(anew, files[:1])
    assert anew.transport.measured == ["good.gguf"]


def test_speeds_without_rearranged_weights_say_so(tmp_path: Path) -> None:
    files = some_models(tmp_path, "good.gguf", "amx.gguf")[2]
    good, without = measure_speed(new_session(tmp_path / "out", Opener()), files)
    assert cells.NOT_REPACKED in without.device["notes"] and cells.NOT_REPACKED not in good.device["notes"]


def test_killed_between_models_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student, files = some_models(tmp_path, "good.gguf", "bad.gguf")
    real = cells.judge_runtime

    def killed_at_bad(runtime: Any, rows: Any, references: Any, label: str) -> Any:
        if "bad" in label:
            raise KeyboardInterrupt
        return real(runtime, rows, references, label)

    monkeypatch.setattr(cells, "judge_runtime", killed_at_bad)
    with pytest.raises(KeyboardInterrupt):
        measure_quality(new_session(tmp_path / "out", Opener()), teacher, student, files)
    assert not (tmp_path / "out" / "scratch").exists()
    monkeypatch.setattr(cells, "judge_runtime", real)
    measure_quality(new_session(tmp_path / "out", resumed := Opener()), teacher, student, files)
    assert resumed.opened == ["teacher", "hf", "bad.gguf"]


def test_other_text_is_another_cell(tmp_path: Path) -> None:
    teacher, student, files = some_models(tmp_path, "good.gguf")
    session = new_session(tmp_path / "out", Opener())
    fewer_rows = replace(session, rows_NS=session.rows_NS[:2], digests={})
    tokens = [measure_quality(one, teacher, student, files)[1].n_tokens for one in (session, fewer_rows)]
    assert tokens == [57, 38]


def test_a_strict_session_raises_a_models_own_error(tmp_path: Path) -> None:
    """A single artifact of another vocabulary is the user's error, and not a failed cell."""
    teacher, student, files = some_models(tmp_path, "other.gguf")
    session = new_session(tmp_path / "out", Opener())
    known = session.rows_NS % (VOCAB - 1)
    with pytest.raises(InputRejected, match="vocabulary"):
        measure_quality(replace(session, rows_NS=known, strict=True), teacher, student, files)
    assert not (tmp_path / "out" / "scratch").exists()
    _, failed = measure_quality(replace(session, rows_NS=known), teacher, student, files)
    assert failed.kl_nats is None and "vocabulary" in failed.reason


def test_gguf_files_are_opened_and_timed_in_the_planned_precision(tmp_path: Path) -> None:
    teacher, student, files = some_models(tmp_path, "good.gguf")
    session = new_session(tmp_path / "out", opener := Opener(), kv_cache="q8_0")
    measure_quality(session, teacher, student, files)
    assert opener.options == {"llama_cpp": {"kv_cache": "q8_0"}, "hf": {}}
    good, hf = measure_speed(session, [*files, student])
    assert {job["runtime"]: job["options"] for job in session.transport.jobs} == opener.options
    assert good.device["kv_cache"] == "q8_0" and "kv_cache" not in hf.device


def test_another_precision_is_another_cell_and_float16_needs_no_option(tmp_path: Path) -> None:
    teacher, student, files = some_models(tmp_path, "good.gguf")
    for cache in ("q8_0", "f16"):
        session = new_session(tmp_path / "out", opener := Opener(), kv_cache=cache)
        measure_quality(session, teacher, student, files)
        good, _ = measure_speed(session, [*files, student])
    assert opener.options["llama_cpp"] == {}, "measured again"
    assert session.transport.measured == ["good.gguf"], "the student's cell does not depend on it"
    assert good.device["kv_cache"] == "f16"


def test_the_digest_of_a_folder_is_of_its_content(tmp_path: Path) -> None:
    teacher, student, _ = some_models(tmp_path)
    before = model_digest(teacher.location)
    assert before != model_digest(student.location)
    (teacher.location / "more.json").write_text("{}")
    assert model_digest(teacher.location) != before
