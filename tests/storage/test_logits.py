"""The logit cache: what comes back, how exact, what is refused, and that a kill costs nothing."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from moe_edge.contracts.errors import InputRejected
from moe_edge.formulas.divergence import TopK, cached_kl, kl_dense, teacher_topk
from moe_edge.formulas.logit_views import WholeLogits
from moe_edge.storage.logit_codec import RowCodec
from moe_edge.storage.logits import LogitCache, LogitCacheWriter, TeacherRow, row_key
from moe_edge.storage.sampled_codec import SampledCodec

TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0)
IDENTITY = {"teacher": "aaaa", "tokenizer": "bbbb", "calibration": "cccc"}
TOKENS, VOCAB, K = 24, 5000, 32


def logits(seed: int, tokens: int = TOKENS, vocab: int = VOCAB) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    zipf_V = -1.4 * torch.arange(1, vocab + 1, dtype=torch.float32).log()
    return (zipf_V + 1.5 * torch.randn(tokens, vocab, generator=generator))[
        :, torch.randperm(vocab, generator=generator)
    ]


def ids(seed: int, tokens: int = TOKENS) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, tokens).astype(np.int32)


def top(seed: int) -> TopK:
    return teacher_topk(logits(seed), K, TEMPERATURES)


def write(path: Path, seeds: range, identity: dict[str, str] = IDENTITY) -> None:
    with LogitCacheWriter(path, VOCAB, K, TEMPERATURES, identity) as writer:
        for seed in seeds:
            writer.append(ids(seed), *top(seed))


def read_kl(row: TeacherRow, student: torch.Tensor, temperature: float) -> torch.Tensor:
    tail = torch.from_numpy(row.tail_logmass_SH[:, TEMPERATURES.index(temperature)].copy())
    return cached_kl(
        WholeLogits(student), torch.from_numpy(row.indices_SK), torch.from_numpy(row.logprobs_SK), tail, temperature
    )


def test_rows_come_back_by_content(tmp_path: Path) -> None:
    write(tmp_path / "logits.h5", range(3))
    with LogitCache(tmp_path / "logits.h5", IDENTITY) as cache:
        assert len(cache) == 3 and cache.temperatures == TEMPERATURES
        for seed in (2, 0, 1):
            row, expected = cache.row(ids(seed).astype(np.int64)), top(seed)
            assert np.array_equal(row.indices_SK, expected.indices_TK.numpy())
            assert np.allclose(row.tail_logmass_SH, expected.tail_logmass_TH.numpy(), rtol=1e-3, atol=1e-3)
            error = np.abs(row.logprobs_SK - expected.logprobs_TK.numpy())
            assert error[:, 1:].max() < 0.15 and np.median(error) < 0.01
            whole = np.exp(row.logprobs_SK.astype(np.float64)).sum(-1) + np.exp(row.tail_logmass_SH[:, 0])
            assert np.allclose(whole, 1, atol=1e-3)
        assert ids(1) in cache and ids(9) not in cache


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_gradient_is_closer_than_top_64_renormalised(tmp_path: Path, temperature: float) -> None:
    write(tmp_path / "logits.h5", range(1))
    teacher = logits(0)
    student = (teacher + 0.5 * torch.randn_like(teacher)).requires_grad_()
    full = torch.autograd.grad(kl_dense(teacher, student, temperature).sum(), student)[0]
    with LogitCache(tmp_path / "logits.h5") as cache:
        ours = torch.autograd.grad(read_kl(cache.row(ids(0)), student, temperature).sum(), student)[0]
    values, kept = (teacher / temperature).topk(64)
    log_q = (student / temperature).log_softmax(-1).gather(-1, kept)
    other = torch.autograd.grad(-(values.softmax(-1) * log_q).sum(), student)[0]
    assert (ours - full).norm() < 0.5 * (other - full).norm()
    exact = teacher_topk(teacher, K, TEMPERATURES)
    tail = exact.tail_logmass_TH[:, TEMPERATURES.index(temperature)]
    unquantised = cached_kl(WholeLogits(student), exact.indices_TK, exact.logprobs_TK, tail, temperature)
    best = torch.autograd.grad(unquantised.sum(), student)[0]
    assert (ours - full).norm() < 1.05 * (best - full).norm()


def test_at_most_120_bytes_per_token_at_150_k_words(tmp_path: Path) -> None:
    vocab, tokens, rows = 151_936, 512, 4
    path = tmp_path / "logits.h5"
    values = teacher_topk(logits(0, 64, 2000), K, TEMPERATURES)
    repeated = [column.repeat(tokens // 64, 1) for column in values]
    with LogitCacheWriter(path, vocab, K, TEMPERATURES, IDENTITY) as writer:
        for seed in range(rows):
            writer.append(ids(seed, tokens), *repeated)
    assert path.stat().st_size <= 120 * rows * tokens


@pytest.mark.parametrize("vocab", (33, 200, 256, 257, 4096, 49152, 65537, 151_936, 300_000))
def test_ids_of_every_width(vocab: int) -> None:
    codec = RowCodec(5, 32, vocab, (1.0,))
    rng = np.random.default_rng(vocab)
    indices = np.stack([rng.permutation(vocab)[:32] for _ in range(5)])
    indices[0, 0] = vocab - 1
    falls = -np.sort(rng.random((5, 32)) * 9).astype(np.float32)
    record = codec.encode(falls, indices, np.full((5, 1), -1.0, np.float32))
    assert len(record) == codec.row_bytes
    assert np.array_equal(codec.decode(np.frombuffer(record, np.uint8))[1], indices)


def test_a_vocabulary_smaller_than_k_is_stored_whole(tmp_path: Path) -> None:
    teacher = torch.randn(TOKENS, 20)
    with LogitCacheWriter(tmp_path / "l.h5", 20, K, TEMPERATURES, {}) as writer:
        assert writer.k == 20
        writer.append(ids(0), *teacher_topk(teacher, K, TEMPERATURES))
    with LogitCache(tmp_path / "l.h5") as cache:
        row = cache.row(ids(0))
    assert np.isneginf(row.tail_logmass_SH).all()
    student = torch.randn(TOKENS, 20)
    torch.testing.assert_close(read_kl(row, student, 2.0), kl_dense(teacher, student, 2.0), rtol=0.05, atol=0.01)


def test_the_same_rows_give_the_same_bytes_also_after_a_kill(tmp_path: Path) -> None:
    write(tmp_path / "straight.h5", range(4))
    path = tmp_path / "logits.h5"
    killed = LogitCacheWriter(path, VOCAB, K, TEMPERATURES, IDENTITY)
    killed.append(ids(0), *top(0))
    killed.append(ids(1), *top(1))
    del killed
    with killed_journal(path).open("ab") as journal:
        journal.write(b"half a row")
    with LogitCacheWriter(path, VOCAB, K, TEMPERATURES, IDENTITY) as writer:
        assert len(writer) == 2 and ids(1) in writer
        for seed in range(4):
            writer.append(ids(seed), *top(seed))
    assert path.read_bytes() == (tmp_path / "straight.h5").read_bytes()
    assert not killed_journal(path).exists()


def killed_journal(path: Path) -> Path:
    return path.with_name(path.name + ".journal")


def test_a_finished_cache_can_be_continued(tmp_path: Path) -> None:
    write(tmp_path / "straight.h5", range(3))
    write(tmp_path / "logits.h5", range(2))
    write(tmp_path / "logits.h5", range(3))
    assert (tmp_path / "logits.h5").read_bytes() == (tmp_path / "straight.h5").read_bytes()


def test_a_refused_continuation_leaves_the_finished_cache_as_it_was(tmp_path: Path) -> None:
    write(tmp_path / "logits.h5", range(3))
    with pytest.raises(InputRejected, match="k: found 32, expected 8"):
        LogitCacheWriter(tmp_path / "logits.h5", VOCAB, 8, TEMPERATURES, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["logits.h5"]
    assert len(LogitCacheWriter(tmp_path / "logits.h5", VOCAB, K, TEMPERATURES, IDENTITY)) == 3


def test_a_kill_while_a_finished_cache_is_taken_up_loses_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "logits.h5", range(3))
    record = LogitCache.record

    def killed(cache: LogitCache, index: int) -> np.ndarray:
        if index == 2:
            raise KeyboardInterrupt
        return record(cache, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LogitCache, "record", killed)
        LogitCacheWriter(tmp_path / "logits.h5", VOCAB, K, TEMPERATURES, IDENTITY)
    assert len(LogitCacheWriter(tmp_path / "logits.h5", VOCAB, K, TEMPERATURES, IDENTITY)) == 3


def test_a_journal_cut_in_its_first_line_is_begun_anew(tmp_path: Path) -> None:
    killed_journal(tmp_path / "logits.h5").write_bytes(b'{"identity": {"tea')
    write(tmp_path / "logits.h5", range(1))
    assert len(LogitCache(tmp_path / "logits.h5")) == 1


def test_an_exception_leaves_the_journal_and_no_cache(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        with LogitCacheWriter(tmp_path / "logits.h5", VOCAB, K, TEMPERATURES, IDENTITY) as writer:
            writer.append(ids(0), *top(0))
            raise KeyboardInterrupt
    assert not (tmp_path / "logits.h5").exists() and killed_journal(tmp_path / "logits.h5").exists()


def test_another_teacher_is_named(tmp_path: Path) -> None:
    write(tmp_path / "logits.h5", range(1))
    with pytest.raises(InputRejected, match="found aaaa, expected dddd"):
        LogitCache(tmp_path / "logits.h5", IDENTITY | {"teacher": "dddd"})
    with pytest.raises(InputRejected, match="found absent, expected x"):
        LogitCache(tmp_path / "logits.h5", {"revision": "x"})
    with pytest.raises(InputRejected, match="aaaa"):
        LogitCacheWriter(tmp_path / "logits.h5", VOCAB, K, TEMPERATURES, IDENTITY | {"teacher": "dddd"})
    half = LogitCacheWriter(tmp_path / "half.h5", VOCAB, K, TEMPERATURES, IDENTITY)
    half.append(ids(0), *top(0))
    with pytest.raises(InputRejected, match="identity"):
        LogitCacheWriter(tmp_path / "half.h5", VOCAB, K, TEMPERATURES, {"teacher": "dddd"})


def test_an_unknown_row_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "logits.h5", range(1))
    with LogitCache(tmp_path / "logits.h5") as cache, pytest.raises(InputRejected, match=row_key(ids(5)).hex()[:16]):
        cache.row(ids(5))


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "logits.h5"
    path.write_bytes(b"not hdf5")
    with pytest.raises(InputRejected, match="cannot be read"):
        LogitCache(path)
    with h5py.File(path, "w") as file:
        file.attrs["schema"] = "other"
    with pytest.raises(InputRejected, match="not a logit cache"):
        LogitCache(path)
    write(tmp_path / "good.h5", range(2))
    whole = (tmp_path / "good.h5").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputRejected):
        LogitCache(path)
    with h5py.File(tmp_path / "good.h5", "r+") as file:
        layout = json.loads(file.attrs["layout"]) | {"k": K - 1}
        file.attrs["layout"] = json.dumps(layout)
    with pytest.raises(InputRejected, match="not a logit cache of this version"):
        LogitCache(tmp_path / "good.h5")


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    writer = LogitCacheWriter(tmp_path / "logits.h5", VOCAB, K, TEMPERATURES, {})
    with pytest.raises(ValueError, match="at least one row"):
        writer.close()
    good = top(0)
    writer.append(ids(0), *good)
    with pytest.raises(ValueError, match="every row has 24 tokens"):
        writer.append(ids(1, 12), *good)
    for wrong, message in (
        ((good.logprobs_TK[:, :5], good.indices_TK, good.tail_logmass_TH), "shapes"),
        ((good.logprobs_TK, good.indices_TK + VOCAB, good.tail_logmass_TH), "ids"),
        ((good.logprobs_TK.flip(-1), good.indices_TK, good.tail_logmass_TH), "descending"),
        ((good.logprobs_TK, good.indices_TK, good.tail_logmass_TH * torch.nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.append(ids(1), *wrong)
    with pytest.raises(ValueError, match="temperature 1"):
        LogitCacheWriter(tmp_path / "x.h5", VOCAB, K, (2.0,), {})
    with pytest.raises(ValueError, match="vocab"):
        RowCodec(4, 32, 2**24, (1.0,))


@pytest.mark.parametrize(
    ("codec", "fill"),
    [
        (RowCodec(5, 4, 300, (1.0,)), 0),
        (RowCodec(5, 1, 300, (1.0,)), 0),
        (RowCodec(5, 4, 300, (1.0,)), 255),
        (RowCodec(5, 4, 300, ()), 0),
        (SampledCodec(5, 9, 300, 1.0, 200), 0),
        (SampledCodec(5, 9, 300, 1.0, 20_000), 255),
    ],
)
def test_a_record_that_no_teacher_can_have_said_is_refused(codec: RowCodec | SampledCodec, fill: int) -> None:
    with pytest.raises(ValueError):
        codec.row(np.full(codec.row_bytes, fill, np.uint8))


def test_a_group_in_place_of_the_rows_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "l.h5", range(1))
    with h5py.File(tmp_path / "l.h5", "a") as file:
        del file["rows"]
        file.create_group("rows")
    with pytest.raises(InputRejected, match="not a logit cache"):
        LogitCache(tmp_path / "l.h5")
