"""The pass: where CKA blocks lie, and that a killed pass ends with the same bits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_edge.profiling.passes import SHARD_ROWS, STATE, cka_blocks, run_pass
from tests.tiny import tiny_ids, tiny_model

ROWS, TOKENS = 2 * SHARD_ROWS + 3, 16


class Killed(Exception):
    """Stands for kill -9."""


def _run(partial: Path, on_logits: Any = None, identity: str = "a", cka_tokens: int = 64) -> dict[str, torch.Tensor]:
    ids = tiny_ids(TOKENS, ROWS).int().numpy()
    return run_pass(
        tiny_model("qwen3_moe"),
        ids,
        cka_tokens=cka_tokens,
        partial=partial,
        identity={"x": identity},
        on_logits=on_logits,
    )


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_killed_pass_resumes_bit_identically(tmp_path: Path) -> None:
    whole = _run(tmp_path / "whole")
    seen: list[bytes] = []

    def die(ids_S: np.ndarray, logits_SV: torch.Tensor) -> None:
        seen.append(ids_S.tobytes())
        if len(seen) == SHARD_ROWS + 3:
            raise Killed

    with pytest.raises(Killed):
        _run(tmp_path / "killed", die)
    first, seen = seen, []
    resumed = _run(tmp_path / "killed", lambda ids_S, logits_SV: seen.append(ids_S.tobytes()))
    assert _same(resumed, whole)
    assert len(seen) == ROWS - SHARD_ROWS
    assert first[SHARD_ROWS:] == seen[: len(first) - SHARD_ROWS]


def test_a_finished_state_is_not_read_again(tmp_path: Path) -> None:
    whole = _run(tmp_path)
    assert _same(_run(tmp_path, lambda *_: pytest.fail("no row is left")), whole)


@pytest.mark.parametrize("damage", [True, False])
def test_a_foreign_or_damaged_state_is_not_resumed(tmp_path: Path, damage: bool) -> None:
    _run(tmp_path, cka_tokens=0)
    if damage:
        (tmp_path / STATE).write_bytes(b"half a file")
    rows: list[bytes] = []
    sums = _run(tmp_path, lambda ids_S, _: rows.append(ids_S.tobytes()), identity="a" if damage else "b")
    assert len(rows) == ROWS
    assert sums["tokens"] == ROWS * TOKENS


def test_logits_are_the_models_own(tmp_path: Path) -> None:
    model, ids = tiny_model("olmoe"), tiny_ids(TOKENS, 5)
    seen: list[torch.Tensor] = []
    run_pass(
        model, ids.int().numpy(), cka_tokens=0, partial=tmp_path, identity={}, on_logits=lambda _, x: seen.append(x)
    )
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(seen), model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_the_state_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    sizes = []
    for rows in (2, 40):
        sums = run_pass(
            tiny_model("qwen3_moe"),
            tiny_ids(TOKENS, rows).int().numpy(),
            cka_tokens=64,
            partial=tmp_path / str(rows),
            identity={},
        )
        sizes.append(sum(tensor.numel() for tensor in sums.values()))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("rows", "row_tokens", "cka_tokens", "count"),
    [(128, 512, 8192, 32), (4, 512, 8192, 8), (3, 100, 250, 2), (3, 100, 1000, 3), (5, 512, 100, 1), (5, 512, 0, 0)],
)
def test_blocks_are_distinct_spread_and_inside_their_rows(
    rows: int, row_tokens: int, cka_tokens: int, count: int
) -> None:
    blocks = cka_blocks(rows, row_tokens, cka_tokens)
    flat = [(row, part.start, part.stop) for row, parts in blocks.items() for part in parts]
    assert len(flat) == len(set(flat)) == count
    assert all(0 <= row < rows and 0 <= start < stop <= row_tokens for row, start, stop in flat)
    assert sum(stop - start for _, start, stop in flat) <= cka_tokens
    if count == 32:
        assert len({row for row, _, _ in flat}) == 32
        assert {start for _, start, _ in flat} == {0, 256}
