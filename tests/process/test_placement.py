"""Where a stage computes: the rules at the very byte, and a decision that outlives the memory that it was made with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_edge.contracts.artifacts import Placement
from moe_edge.contracts.checkpoint import CheckpointHeaders, TensorInfo
from moe_edge.process import placement
from moe_edge.process.placement import (
    DECIDED,
    EDIT_FACTOR,
    RUN_SHARE,
    can_be_edited,
    compute_device,
    fits_in_memory,
    free_bytes,
    held_bytes,
    settled,
    to_edit,
    to_run,
)
from moe_edge.process.ranks import Ranks
from moe_edge.storage.folders import hash_folder

WEIGHTS = 3000
HEADERS = CheckpointHeaders(  # stored in two bytes each
    Path("teacher"), {}, {"x": TensorInfo("x", "x.safetensors", "BF16", (30, 100), 2 * WEIGHTS, 0)}, 2 * WEIGHTS
)


@pytest.fixture(autouse=True)
def a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules of a machine without an accelerator, on whatever machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    """Say how many bytes are free."""

    def say(count: float) -> None:
        monkeypatch.setattr(placement, "free_memory_bytes", lambda: int(count))

    return say


def test_a_teacher_that_runs_may_take_a_share_of_what_is_free(free) -> None:
    needed = 4 * WEIGHTS
    assert held_bytes(HEADERS, torch.float32) == needed == 2 * held_bytes(HEADERS, torch.bfloat16)
    free(needed / RUN_SHARE)
    assert to_run(HEADERS, "auto", "auto", Ranks()) == Placement(device="cpu", dtype="float32", mode="whole")
    free(needed / RUN_SHARE - 1)
    assert to_run(HEADERS, "auto", "auto", Ranks()).mode == "streamed"
    assert to_run(HEADERS, "bfloat16", "auto", Ranks()) == Placement(dtype="bfloat16"), "half as large"


def test_a_mode_that_was_asked_for_holds_whatever_is_free(free) -> None:
    free(1)
    assert to_run(HEADERS, "float32", "whole", Ranks()).whole
    free(2**40)
    assert not to_run(HEADERS, "float32", "layerwise", Ranks()).whole


def test_processes_of_one_machine_share_its_memory(free) -> None:
    free(4 * WEIGHTS / RUN_SHARE)
    assert free_bytes("cpu", sharers=2) == free_bytes() // 2
    assert fits_in_memory(HEADERS, torch.float32) and not fits_in_memory(HEADERS, torch.float32, sharers=2)
    assert to_run(HEADERS, "auto", "auto", Ranks(0, 2, 0, 1)) == Placement(processes=2), "each on its own machine"
    assert to_run(HEADERS, "auto", "auto", Ranks(0, 2, 0, 2)) == Placement(mode="streamed", processes=2)


def test_a_teacher_that_is_changed_needs_room_beside_it_as_it_is_stored(free) -> None:
    free(EDIT_FACTOR * 2 * WEIGHTS)
    assert can_be_edited(HEADERS) and to_edit(HEADERS, streamed=False, accelerate=True) == Placement()
    assert not to_edit(HEADERS, streamed=True, accelerate=True).whole, "as asked"
    free(EDIT_FACTOR * 2 * WEIGHTS - 1)
    assert not can_be_edited(HEADERS) and not to_edit(HEADERS, streamed=False, accelerate=True).whole


def test_an_accelerator_is_judged_by_its_own_memory(free, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (int(2 * WEIGHTS / RUN_SHARE), 0))
    free(1)
    assert compute_device(Ranks(3, 4, 3, 4)) == torch.device("cuda", 1)
    assert to_run(HEADERS, "auto", "auto", Ranks()) == Placement(device="cuda:0", dtype="bfloat16", mode="whole")
    assert to_run(HEADERS, "float32", "auto", Ranks()).mode == "streamed"
    free(2**40)
    assert to_edit(HEADERS, streamed=False, accelerate=True).device == "cuda:0"
    assert to_edit(HEADERS, streamed=False, accelerate=False).device == "cpu", "nothing to compute"
    assert to_edit(replace(HEADERS, total_bytes=2**20), streamed=False, accelerate=True).device == "cpu", "no room"


def test_a_decision_is_kept_and_read_again_whatever_is_free_then(tmp_path: Path, free) -> None:
    def decide() -> Placement:
        return to_run(HEADERS, "auto", "auto", Ranks())

    free(2**40)
    first = settled(tmp_path, decide)
    assert first.whole
    free(1)
    assert settled(tmp_path, decide) == first, "a resumed stage goes on as it began"
    assert [path.name for path in tmp_path.iterdir()] == [DECIDED]
    (tmp_path / DECIDED).unlink()
    assert not settled(tmp_path, decide).whole, "a new one does not"


def test_another_number_of_processes_decides_anew(tmp_path: Path) -> None:
    (tmp_path / DECIDED).write_text(Placement(mode="streamed", processes=2).model_dump_json())
    assert settled(tmp_path, Placement) == Placement()
    assert Placement.model_validate_json((tmp_path / DECIDED).read_text()) == Placement()


def test_a_refusal_keeps_nothing(tmp_path: Path) -> None:
    def refuse() -> Placement:
        raise MemoryError

    with pytest.raises(MemoryError):
        settled(tmp_path, refuse)
    assert list(tmp_path.iterdir()) == []


def test_where_a_stage_computed_is_no_part_of_what_it_computed(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    before = hash_folder(tmp_path)
    settled(tmp_path, Placement)
    assert (tmp_path / DECIDED).is_file() and hash_folder(tmp_path) == before and set(before) == {"result.json"}
