"""The pass: where CKA blocks lie, that a killed pass ends with the same bits, and that shares add up."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_edge.models.loading import load_model
from moe_edge.profiling.passes import SHARD_ROWS, STATE, cka_blocks, run_pass, share_of
from moe_edge.profiling.sums import PassSums, merged
from tests.profiling.runs import ROWS, TOKENS, Killed, flat, same_bits, whole_pass
from tests.tiny import tiny_checkpoint, tiny_ids, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("teacher"), "qwen3_moe", with_tokenizer=False)


def test_a_killed_pass_resumes_bit_identically(folder: Path, tmp_path: Path) -> None:
    whole = whole_pass(folder, tmp_path / "whole")
    seen: list[bytes] = []

    def die(ids_S: np.ndarray, logits_SV: torch.Tensor) -> None:
        seen.append(ids_S.tobytes())
        if len(seen) == SHARD_ROWS + 3:
            raise Killed

    with pytest.raises(Killed):
        whole_pass(folder, tmp_path / "killed", die)
    first, seen = seen, []
    resumed = whole_pass(folder, tmp_path / "killed", lambda ids_S, logits_SV: seen.append(ids_S.tobytes()))
    assert same_bits(resumed, whole)
    assert len(seen) == ROWS - SHARD_ROWS
    assert first[SHARD_ROWS:] == seen[: len(first) - SHARD_ROWS]


def test_a_finished_state_is_not_read_again(folder: Path, tmp_path: Path) -> None:
    whole = whole_pass(folder, tmp_path)
    assert same_bits(whole_pass(folder, tmp_path, lambda *_: pytest.fail("no row is left")), whole)


@pytest.mark.parametrize("damage", [True, False])
def test_a_foreign_or_damaged_state_is_not_resumed(folder: Path, tmp_path: Path, damage: bool) -> None:
    whole_pass(folder, tmp_path, cka_tokens=0)
    if damage:
        (tmp_path / STATE).write_bytes(b"half a file")
    rows: list[bytes] = []
    sums = whole_pass(folder, tmp_path, lambda ids_S, _: rows.append(ids_S.tobytes()), identity="a" if damage else "b")
    assert len(rows) == ROWS
    assert sums.model["tokens"] == ROWS * TOKENS


@pytest.mark.parametrize("world", [2, 5])
def test_the_shares_of_several_processes_add_up(folder: Path, tmp_path: Path, world: int) -> None:
    whole = flat(whole_pass(folder, tmp_path / "whole"))
    seen: list[bytes] = []
    parts = [
        whole_pass(folder, tmp_path / str(rank), lambda ids_S, _: seen.append(ids_S.tobytes()), rank=rank, world=world)
        for rank in range(world)
    ]
    total = flat(merged([PassSums.load(tmp_path / str(rank) / STATE)[0] for rank in range(world)]))
    assert all(same_bits(part, PassSums.load(tmp_path / str(rank) / STATE)[0]) for rank, part in enumerate(parts))
    assert sorted(seen) == sorted(ids_S.tobytes() for ids_S in tiny_ids(TOKENS, ROWS).int().numpy())
    assert total.keys() == whole.keys()
    for name, tensor in whole.items():
        if tensor.dtype == torch.int64:
            assert torch.equal(total[name], tensor), name
        else:
            torch.testing.assert_close(total[name], tensor, rtol=1e-9, atol=1e-12)


def test_logits_are_the_models_own(folder: Path, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []
    whole_pass(folder, tmp_path, lambda _, logits_SV: seen.append(logits_SV), cka_tokens=0)
    with torch.no_grad():
        expected = load_model(folder)(input_ids=tiny_ids(TOKENS, ROWS)).logits
    torch.testing.assert_close(torch.stack(seen), expected, rtol=1e-4, atol=1e-4)


def test_the_state_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    sizes = []
    for rows in (2, 40):
        work = share_of(tiny_ids(TOKENS, rows).int().numpy(), 16)
        sums = run_pass(tiny_model("qwen3_moe"), work, partial=tmp_path / str(rows), identity={})
        sizes.append(sum(tensor.numel() for tensor in flat(sums).values()))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("rows", "row_tokens", "cka_tokens", "count"),
    [(128, 512, 8192, 32), (4, 512, 8192, 8), (3, 100, 250, 2), (3, 100, 1000, 3), (5, 512, 100, 1), (5, 512, 0, 0)],
)
def test_blocks_are_distinct_spread_and_inside_their_rows(
    rows: int, row_tokens: int, cka_tokens: int, count: int
) -> None:
    blocks = cka_blocks(rows, row_tokens, cka_tokens)
    found = [(row, span) for row, spans in blocks.items() for span in spans]
    flat_spans = [(row, span.tokens.start, span.tokens.stop) for row, span in found]
    assert len(flat_spans) == len(set(flat_spans)) == count
    assert all(0 <= row < rows and 0 <= start < stop <= row_tokens for row, start, stop in flat_spans)
    assert sum(len(span.tokens) for _, span in found) <= cka_tokens
    assert [span.number for _, span in found] == list(range(count))
    if count == 32:
        assert len({row for row, _, _ in flat_spans}) == 32
        assert {start for _, start, _ in flat_spans} == {0, 256}
        assert [span.group for _, span in found] == [number // 2 for number in range(32)]
