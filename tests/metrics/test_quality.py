"""The judge against dense float64 references, and what it does with broken logits."""

import json

import numpy as np
import pytest
import torch

from moe_edge.contracts.errors import InputRejected
from moe_edge.metrics import quality
from moe_edge.metrics.quality import QualityJudge, bootstrap_ci95, resampled_ci95


def _rows(rows: int, length: int, vocab: int, noise: float, seed: int = 0) -> list[tuple[np.ndarray, ...]]:
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        reference_SV = generator.normal(0, 3, (length, vocab)).astype(np.float32)
        artifact_SV = (reference_SV + generator.normal(0, noise, (length, vocab))).astype(np.float32)
        made.append((reference_SV, artifact_SV, generator.integers(vocab, size=length)))
    return made


def _judge(rows: list[tuple[np.ndarray, ...]]) -> quality.Score:
    judge = QualityJudge()
    for row in rows:
        judge.add(*row)
    return judge.result()


def test_numbers_equal_a_dense_float64_reference() -> None:
    rows = _rows(3, 17, 61, noise=0.7)
    score = _judge(rows)
    p = torch.cat([torch.tensor(r, dtype=torch.float64)[:-1] for r, _, _ in rows]).log_softmax(-1)
    q = torch.cat([torch.tensor(a, dtype=torch.float64)[:-1] for _, a, _ in rows]).log_softmax(-1)
    targets = torch.cat([torch.tensor(ids)[1:] for _, _, ids in rows])
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / len(targets)
    assert score.kl_nats == pytest.approx(kl.item(), rel=1e-12)
    assert score.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    nll = torch.nn.functional.nll_loss
    assert score.perplexity == pytest.approx(nll(q, targets).exp().item(), rel=1e-12)
    assert score.reference_perplexity == pytest.approx(nll(p, targets).exp().item(), rel=1e-12)
    assert (score.n_tokens, score.n_rows, score.reason) == (48, 3, None)


def test_chunks_do_not_change_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rows(1, 33, 50, noise=0.5)
    whole = _judge(rows)
    monkeypatch.setattr(quality, "CHUNK_ELEMENTS", 150)
    assert _judge(rows).kl_nats == pytest.approx(whole.kl_nats, rel=1e-13)


def test_identical_logits_cost_nothing_and_a_shift_changes_nothing() -> None:
    rows = [(reference, reference + np.float32(4), ids) for reference, _, ids in _rows(2, 9, 40, noise=0)]
    score = _judge(rows)
    assert score.kl_nats == pytest.approx(0, abs=1e-10)
    assert score.kl_nats >= 0
    assert score.top1_agreement == 1
    assert score.perplexity == pytest.approx(score.reference_perplexity, rel=1e-6)


def test_the_target_of_a_position_is_the_next_token() -> None:
    ids = np.array([3, 1, 2, 0])
    logits_SV = np.zeros((4, 5), dtype=np.float32)
    logits_SV[np.arange(3), ids[1:]] = 20  # position s is sure of token s + 1
    judge = QualityJudge()
    judge.add(logits_SV, logits_SV, ids)
    assert judge.result().perplexity == pytest.approx(1, abs=1e-6)


def test_extreme_logits_stay_finite() -> None:
    (reference, _, ids) = _rows(1, 6, 30, noise=0)[0]
    score = _judge([(reference, reference * np.float32(1e4), ids)])
    assert np.isfinite(score.kl_nats)
    assert score.perplexity is None
    assert "overflows" in score.reason


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_broken_logits_are_a_failed_quality_and_never_zero(broken: float) -> None:
    rows = _rows(2, 8, 20, noise=0.1)
    rows[1][1][5, 3] = broken
    score = _judge(rows)
    assert score.kl_nats is None
    assert score.perplexity is None
    assert score.top1_agreement is None
    assert score.reason == "NaN or infinite logits at row 1, position 5"


def test_a_broken_reference_is_refused() -> None:
    reference, artifact, ids = _rows(1, 8, 20, noise=0.1)[0]
    reference[0, 0] = np.nan
    with pytest.raises(InputRejected, match="reference"):
        QualityJudge().add(reference, artifact, ids)


def test_different_vocabularies_are_refused_with_both_sizes() -> None:
    reference, artifact, ids = _rows(1, 8, 20, noise=0.1)[0]
    with pytest.raises(InputRejected, match="19 entries.*20"):
        QualityJudge().add(reference, artifact[:, :19], ids)


def test_rows_of_other_lengths_and_single_tokens_are_refused() -> None:
    reference, artifact, ids = _rows(1, 8, 20, noise=0.1)[0]
    for row in ((reference, artifact[:-1], ids), (reference[:1], artifact[:1], ids[:1])):
        with pytest.raises(ValueError, match="rows differ"):
            QualityJudge().add(*row)


def test_nothing_judged_is_no_number() -> None:
    assert QualityJudge().result().kl_nats is None
    assert QualityJudge().result().reason == "no row was judged"


def test_interval_is_over_rows_seeded_and_holds_the_mean() -> None:
    score = _judge(_rows(12, 9, 40, noise=0.6))
    low, high = score.kl_nats_ci95
    assert low < score.kl_nats < high
    assert score.kl_nats_ci95 == _judge(_rows(12, 9, 40, noise=0.6)).kl_nats_ci95
    assert bootstrap_ci95([1.0, 1.0, 1.0], [4, 4, 4]) == (0.25, 0.25)
    assert bootstrap_ci95([1.0], [4]) is None
    json.dumps(score.kl_nats_ci95)


def test_a_resampled_interval_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(50, 10, 400)
    low, high = resampled_ci95(400, lambda draws_BN: values[draws_BN].mean(1), 1000) or (0, 0)
    half = 1.96 * values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - half, abs=0.3) and high == pytest.approx(values.mean() + half, abs=0.3)
    assert resampled_ci95(1, lambda draws_BN: draws_BN[:, 0], 1000) is None
