"""The folder of shards: resumable, pinned, checked when read, and bounded in open files."""

from pathlib import Path

import numpy as np
import pytest

from moe_edge.contracts.errors import InputRejected
from moe_edge.storage import logit_shards
from moe_edge.storage.logit_codec import RowCodec
from moe_edge.storage.logit_shards import (
    SHARDS_SCHEMA,
    ShardedLogits,
    begin_capture,
    finish_capture,
    shard_name,
    shard_span,
    write_shard,
)
from moe_edge.storage.rows import TokenRows
from tests.storage.test_logits import TEMPERATURES, TOKENS, VOCAB, K, ids, top

ROWS = TokenRows(np.stack([ids(seed) for seed in range(7)]), 7 * TOKENS)
CODEC = RowCodec(TOKENS, K, VOCAB, TEMPERATURES)
PINS = {"schema": SHARDS_SCHEMA, "teacher": "aaaa", "rows": ROWS.digest, "shard_rows": 3, "k": K}


def write(folder: Path, number: int) -> None:
    rows = shard_span(PINS, number, 7)
    records = [CODEC.encode(*(column.numpy() for column in top(row))) for row in rows]
    write_shard(folder, PINS, number, CODEC, [ids(row) for row in rows], records)


def finished(folder: Path) -> Path:
    for number in begin_capture(folder, PINS, ROWS):
        write(folder, number)
    finish_capture(folder, PINS, {})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_come_back_from_whichever_shard(tmp_path: Path) -> None:
    cache = ShardedLogits(finished(tmp_path / "c"), {"teacher": "aaaa"})
    assert len(cache) == 7 and cache.temperatures == TEMPERATURES and cache.codec.k == K
    for seed in (6, 0, 3, 5):
        assert np.array_equal(cache.row(ids(seed)).indices_SK, top(seed).indices_TK.numpy())
    assert ids(2) in cache and ids(9) not in cache
    with pytest.raises(InputRejected, match="does not hold this row"):
        cache.row(ids(9))
    cache.close()


def test_a_killed_capture_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    assert begin_capture(folder, PINS, ROWS) == [0, 1, 2]
    write(folder, 2)
    write(folder, 0)
    (folder / "shard-00001.h5.77.tmp").write_bytes(b"half a shard")
    with pytest.raises(InputRejected, match="no manifest of a finished capture"):
        ShardedLogits(folder)
    assert begin_capture(folder, PINS, ROWS) == [1]
    assert not list(folder.glob("*.tmp"))
    write(folder, 1)
    assert begin_capture(folder, PINS, ROWS) == []
    finish_capture(folder, PINS, {})
    assert contents(folder) == contents(finished(tmp_path / "straight"))


def test_damaged_and_foreign_shards_are_captured_again(tmp_path: Path) -> None:
    folder = finished(tmp_path / "c")
    (folder / shard_name(0)).write_bytes((folder / shard_name(0)).read_bytes()[:500])
    (folder / shard_name(1)).write_bytes((folder / shard_name(2)).read_bytes())
    assert begin_capture(folder, PINS, ROWS) == [0, 1]


def test_another_capture_is_refused_by_the_name_of_its_pins(tmp_path: Path) -> None:
    folder = finished(tmp_path / "c")
    with pytest.raises(InputRejected, match=r"k: found 32, expected 16") as caught:
        begin_capture(folder, PINS | {"k": 16}, ROWS)
    assert "another capture" in str(caught.value) and "teacher" not in str(caught.value)
    assert caught.value.exit_code == 4
    with pytest.raises(InputRejected, match="draws: found absent, expected 50"):
        begin_capture(folder, PINS | {"draws": 50}, ROWS)
    with pytest.raises(InputRejected, match="teacher: found aaaa, expected bbbb"):
        ShardedLogits(folder, {"teacher": "bbbb", "k": K})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputRejected, match="not empty"):
        begin_capture(tmp_path / "other", PINS, ROWS)


def test_a_changed_shard_is_found_when_it_is_read(tmp_path: Path) -> None:
    folder = finished(tmp_path / "c")
    raw = bytearray((folder / shard_name(2)).read_bytes())
    raw[-40] ^= 1
    (folder / shard_name(2)).write_bytes(raw)
    cache = ShardedLogits(folder)
    cache.row(ids(0))
    with pytest.raises(InputRejected, match="SHA-256"):
        cache.row(ids(6))
    (folder / shard_name(2)).unlink()
    with pytest.raises(InputRejected, match="missing"):
        ShardedLogits(folder).row(ids(6))


def test_changed_tokens_are_found_when_it_is_opened(tmp_path: Path) -> None:
    folder = finished(tmp_path / "c")
    TokenRows(ROWS.ids_NS + 1, ROWS.asked_tokens).save(folder / "rows.safetensors")
    with pytest.raises(InputRejected, match="rows: found"):
        ShardedLogits(folder)


def test_few_shards_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_shards, "OPEN_SHARDS", 2)
    cache = ShardedLogits(finished(tmp_path / "c"))
    for seed in (0, 3, 6, 1, 4):
        cache.row(ids(seed))
        assert len(cache._open) <= 2
    cache.close()
    assert not cache._open
