"""Random draws as bytes: every vocabulary width, what a row costs, and what is refused."""

import numpy as np
import pytest
import torch

from moe_edge.formulas.sampling import draw
from moe_edge.storage.logit_file import codec_of
from moe_edge.storage.sampled_codec import SampledCodec


def drawn(vocab: int, tokens: int = 7, draws: int = 50) -> list[np.ndarray]:
    logits_TV = -1.3 * torch.arange(1, vocab + 1).log() + torch.randn(tokens, vocab)
    return [column.numpy() for column in draw(logits_TV[:, torch.randperm(vocab)], draws, 1.0, torch.Generator())]


@pytest.mark.parametrize("vocab", (2, 33, 256, 257, 49152, 65537, 151_936))
def test_rows_of_every_width_come_back(vocab: int) -> None:
    indices, counts, entropy = drawn(vocab)
    record = SampledCodec(7, 50, vocab, 1.0, 0).encode(indices, counts, entropy)
    codec = codec_of(SampledCodec(7, 50, vocab, 1.0, len(record) + 9).layout())
    assert codec.temperatures == (1.0,) and codec.row_bytes == len(record) + 9
    row = codec.row(np.frombuffer(record.ljust(codec.row_bytes, b"\0"), np.uint8))
    assert np.array_equal(row.indices_SU, indices) and np.array_equal(row.counts_SU, counts)
    assert np.allclose(row.entropy_S, entropy, rtol=1e-3)


def test_fifty_draws_cost_less_than_the_top_32() -> None:
    indices, counts, entropy = drawn(151_936, tokens=16)
    codec = SampledCodec(16, 50, 151_936, 1.0, 0)
    unique = (counts > 0).sum(-1).mean()
    assert len(codec.encode(indices, counts, entropy)) / 16 == pytest.approx(3 + 3.25 * unique, abs=0.1)
    assert 3 + 3.25 * unique < 113


def test_what_does_not_fit_is_refused() -> None:
    indices, counts, entropy = drawn(100)
    codec = SampledCodec(7, 50, 100, 1.0, 0)
    for wrong, message in (
        ((indices[:5], counts[:5], entropy), "7 tokens"),
        ((indices, counts, entropy[:5]), "7 tokens"),
        ((indices + 100, counts, entropy), "ids"),
        ((indices, counts + 1, entropy), "counts sum to 50"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.encode(*wrong)
    record = codec.encode(indices, counts, entropy)
    with pytest.raises(ValueError, match="says that it has"):
        codec.row(np.frombuffer(record[:-1], np.uint8))
    for values in ((7, 256, 100, 1.0, 0), (7, 0, 100, 1.0, 0), (7, 50, 2**24, 1.0, 0), (7, 50, 100, 0.0, 0)):
        with pytest.raises(ValueError, match="draws"):
            SampledCodec(*values)
