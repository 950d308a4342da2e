"""Capture: the cache equals the teacher, whole or streamed, killed or not; draws repeat; pins are those of the teacher."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.distillation import capture, readers
from moe_edge.distillation.capture import CaptureConfig, captured_signal, encoder_of, pins_of
from moe_edge.distillation.capture_cost import capture_cost
from moe_edge.distillation.readers import StreamedReader, WholeReader
from moe_edge.distillation.signal import SampledSignal, TeacherSignal
from moe_edge.formulas.divergence import teacher_topk
from moe_edge.formulas.logit_views import WholeLogits
from moe_edge.models.loading import load_model
from moe_edge.storage.rows import TokenRows
from tests.distillation.parts import teacher_of
from tests.tiny import TOKENIZER_SIZE, tiny_checkpoint, tiny_ids

CPU = torch.device("cpu")
CONFIG = CaptureConfig(k=8, shard_rows=3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("teacher"), "qwen3_moe", layers=3, vocab=TOKENIZER_SIZE + 16)


def token_rows(count: int = 8, tokens: int = 20) -> TokenRows:
    ids_NS = tiny_ids(tokens, count, 300).numpy().astype(np.int32)
    return TokenRows(ids_NS, ids_NS.size)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_signal_is_the_teachers_top_k(teacher: Path, tmp_path: Path) -> None:
    rows = token_rows()
    signal = captured_signal(teacher_of(teacher), rows, tmp_path / "c", CONFIG)
    assert signal.vocab < TOKENIZER_SIZE + 16  # the head's padding is cut off
    model = load_model(teacher)
    for ids_S in torch.from_numpy(rows.ids_NS).long():
        with torch.no_grad():
            expected = teacher_topk(model(ids_S[None]).logits[0], 8, (1.5,), signal.vocab)
        ours = signal.signal(ids_S, 1.5)
        assert isinstance(ours, TeacherSignal) and torch.equal(ours.indices_SK, expected.indices_TK)
        torch.testing.assert_close(ours.logprobs_SK, expected.logprobs_TK, rtol=0.05, atol=0.03)
        torch.testing.assert_close(ours.tail_logmass_S, expected.tail_logmass_TH[:, 0], rtol=1e-2, atol=1e-3)
    with pytest.raises(ConfigError, match="temperature 3"):
        signal.require(3.0)
    assert "top-8" in signal.description
    signal.close()


def test_a_kill_between_shards_costs_one_shard(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured_signal(teacher_of(teacher), token_rows(), tmp_path / "straight", CONFIG).close()
    written, write = [], capture.write_shard

    def killed(folder, pins, number, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        write(folder, pins, number, *rest)

    monkeypatch.setattr(capture, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        captured_signal(teacher_of(teacher), token_rows(), tmp_path / "c", CONFIG)
    assert not (tmp_path / "c" / "manifest.json").exists()
    again = []
    monkeypatch.setattr(capture, "write_shard", lambda *given: (again.append(given[2]), write(*given)))
    captured_signal(teacher_of(teacher), token_rows(), tmp_path / "c", CONFIG).close()
    assert (written, again) == ([0, 1], [2])
    assert files(tmp_path / "c") == files(tmp_path / "straight")
    monkeypatch.setattr(capture, "open_reader", None)  # a finished cache needs no teacher
    captured_signal(teacher_of(teacher), token_rows(), tmp_path / "c", CONFIG).close()


def test_a_streamed_teacher_gives_the_same_logits(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab, parts = 100, [token_rows().ids_NS[:5], token_rows().ids_NS[5:]]
    whole, streamed = (
        WholeReader(teacher, torch.float32, CPU, vocab),
        StreamedReader(teacher, torch.float32, CPU, vocab, tmp_path),
    )
    ours, expected = list(streamed.logits(parts)), list(whole.logits(parts))
    assert len(ours) == len(expected) == 8 and ours[0].shape == (20, 100)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert not list(tmp_path.glob(".spill*"))
    monkeypatch.setattr(capture, "fits_in_memory", lambda *given: False)
    monkeypatch.setattr(readers, "SPILL_BYTES", 2 * 3 * 20 * 64 * 4)  # two shards of three rows in a group
    signal = captured_signal(teacher_of(teacher), token_rows(), tmp_path / "c", CONFIG)
    ids_S = torch.from_numpy(token_rows().ids_NS[7]).long()
    top = teacher_topk(next(iter(whole.logits([ids_S[None].numpy()]))), 8, (1.0,), 100)
    assert signal.signal(ids_S, 1.0).indices_SK.shape == top.indices_TK.shape
    streamed.close()


def test_draws_are_seeded_by_the_row(teacher: Path, tmp_path: Path) -> None:
    config = CaptureConfig(draws=20, temperatures=(2.0,), shard_rows=3)
    signal = captured_signal(teacher_of(teacher), token_rows(), tmp_path / "c", config)
    turned = TokenRows(token_rows().ids_NS[::-1].copy(), 160)
    other = captured_signal(
        teacher_of(teacher), turned, tmp_path / "turned", CaptureConfig(draws=20, temperatures=(2.0,))
    )
    for ids_S in torch.from_numpy(turned.ids_NS).long():
        one, two = signal.signal(ids_S, 2.0), other.signal(ids_S, 2.0)
        assert isinstance(one, SampledSignal)
        assert torch.equal(one.indices_SU, two.indices_SU) and torch.equal(one.counts_SU, two.counts_SU)
        assert (one.counts_SU.sum(-1) == 20).all()
        assert one.forward_kl(WholeLogits(torch.randn(20, signal.vocab)), 2.0).isfinite().all()
    assert "20 draws" in signal.description
    with pytest.raises(ConfigError, match="temperature 1"):
        signal.signal(ids_S, 1.0)


def test_every_pin_is_compared(teacher: Path, tmp_path: Path) -> None:
    captured_signal(teacher_of(teacher), token_rows(), tmp_path / "c", CONFIG).close()
    for config, rows, word in (
        (CaptureConfig(k=9, shard_rows=3), token_rows(), "k: found 8, expected 9"),
        (CaptureConfig(k=8, shard_rows=3, temperatures=(4.0,)), token_rows(), "temperatures"),
        (CaptureConfig(k=8, shard_rows=3, dtype="bfloat16"), token_rows(), "dtype"),
        (CaptureConfig(k=8, shard_rows=4), token_rows(), "shard_rows"),
        (CaptureConfig(draws=5, temperatures=(1.0,), shard_rows=3), token_rows(), "coding"),
        (CONFIG, token_rows(7), "rows"),
    ):
        with pytest.raises(InputRejected, match=word):
            captured_signal(teacher_of(teacher), rows, tmp_path / "c", config)


def test_pins_follow_the_teacher_its_tokenizer_and_its_template(teacher: Path, tmp_path: Path) -> None:
    before = pins_of(teacher_of(teacher), token_rows(), CONFIG, CPU)
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    template = next(path for path in other.iterdir() if path.name == "chat_template.jinja")
    template.write_text(template.read_text() + " ")
    after = pins_of(teacher_of(other), token_rows(), CONFIG, CPU)
    assert {name for name in before if before[name] != after[name]} == {"teacher", "tokenizer", "chat_template"}


def test_impossible_settings_are_refused() -> None:
    for values in ({"draws": 256}, {"k": 0}, {"shard_rows": 0}, {"temperatures": (-1.0,)}, {"dtype": "int8"}):
        with pytest.raises(ConfigError):
            CaptureConfig(**({"temperatures": (1.0,)} | values))
    with pytest.raises(ConfigError, match="one temperature"):
        CaptureConfig(draws=50)


@pytest.mark.parametrize("draws", (0, 20))
def test_the_forecast_of_the_bytes_is_right(teacher: Path, tmp_path: Path, draws: int) -> None:
    config = CaptureConfig(k=8, draws=draws, temperatures=(1.0,), shard_rows=8)
    rows = token_rows()
    captured_signal(teacher_of(teacher), rows, tmp_path / "c", config).close()
    pins = pins_of(teacher_of(teacher), rows, config, CPU)
    encoder = encoder_of(config, 20, pins["vocab"])
    cost = capture_cost(
        WholeReader(teacher, torch.float32, CPU, pins["vocab"]),
        encoder,
        teacher_of(teacher).headers,
        pins,
        rows.ids_NS[0],
        2,
    )
    written = sum((tmp_path / "c" / name).stat().st_size for name in ("shard-00000.h5", "rows.safetensors"))
    assert abs(written - cost.cache_bytes) < 400 + 0.15 * bool(draws) * written  # headers, and how rows differ
    assert cost.seconds > 0 and cost.live_teacher_seconds_per_epoch == pytest.approx(2 * cost.seconds)
    tensors = sum(parameter.numel() for parameter in load_model(teacher).parameters())
    assert cost.live_teacher_bytes == pytest.approx(4 * tensors, rel=0.05)
    streamed = StreamedReader(teacher, torch.float32, CPU, pins["vocab"], tmp_path)
    most = capture_cost(streamed, encoder, teacher_of(teacher).headers, pins, rows.ids_NS[0])
    assert most.layerwise and most.cache_bytes >= cost.cache_bytes and most.seconds > 0
    assert ("at most" in most.text()) == bool(draws) and "layer by layer" in most.text()
