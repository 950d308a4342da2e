"""Known answers for debiased CKA, against a slow float64 reference written straight from Song'12.

Shape suffixes: E feature maps, N tokens, D features.
"""

import pytest
import torch

from moe_edge.formulas.cka import (
    cka_across,
    cka_from_hsic,
    gate_gram,
    gram,
    hsic_across,
    hsic_all_pairs,
    hsic_from_grams,
    normalise_rows,
    sink_mask,
)

D = 64


def _features(experts: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(experts, tokens, D, generator=torch.Generator().manual_seed(seed))


def _related(tokens: int, seed: int = 0) -> torch.Tensor:
    """Two feature maps that share part of their signal: CKA well between 0 and 1."""
    shared, own_a, own_b = _features(3, tokens, seed)
    return torch.stack([shared + own_a, shared[:, torch.randperm(D)] + own_b])


def _reference_hsic(x_ND: torch.Tensor, y_ND: torch.Tensor) -> float:
    """Song'12 eq. 5, term by term, in float64."""
    n = len(x_ND)
    k, m = (f.double() @ f.double().T for f in (x_ND, y_ND))
    k.fill_diagonal_(0)
    m.fill_diagonal_(0)
    one = torch.ones(n, dtype=torch.float64)
    first = torch.trace(k @ m)
    second = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (one @ k @ m @ one)
    return float((first + second - third) / (n * (n - 3)))


def _blockwise_cka(features_END: torch.Tensor, block: int) -> torch.Tensor:
    blocks = features_END.split(block, dim=1)
    return cka_from_hsic(sum(hsic_all_pairs(part) for part in blocks))


def test_all_pairs_equal_the_slow_reference() -> None:
    features = normalise_rows(_features(4, 50) + 2.0)
    hsic = hsic_all_pairs(features)
    expected = torch.tensor([[_reference_hsic(a, b) for b in features] for a in features], dtype=torch.float64)
    torch.testing.assert_close(hsic, expected, rtol=1e-4, atol=1e-7)
    assert hsic.dtype == torch.float64


def test_independent_features_have_no_cka() -> None:
    cka = _blockwise_cka(normalise_rows(_features(2, 4096)), 256)
    assert abs(cka[0, 1]) < 0.01


def test_rotated_and_scaled_copy_is_one() -> None:
    x = _features(1, 512)[0]
    rotation, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1)))
    assert _blockwise_cka(torch.stack([x, 3.7 * x @ rotation]), 256)[0, 1] == pytest.approx(1.0, abs=1e-5)


def test_minibatches_reproduce_the_full_value() -> None:
    features = normalise_rows(_related(4096))
    full, parts = _blockwise_cka(features, 4096)[0, 1], _blockwise_cka(features, 256)[0, 1]
    assert 0.1 < full < 0.9
    assert parts == pytest.approx(float(full), abs=0.005)


def test_sinks_fake_similarity_until_they_are_masked() -> None:
    features = _features(2, 1024)
    hidden = torch.randn(1024, D)
    massive = 500 * torch.randn(D)
    features[:, [0, 400]] += massive
    hidden[[0, 400]] += massive
    contaminated = cka_from_hsic(hsic_all_pairs(features))[0, 1]
    dropped = sink_mask(hidden, torch.arange(1024))
    clean = cka_from_hsic(hsic_all_pairs(normalise_rows(features[:, ~dropped])))[0, 1]
    assert contaminated > 0.9
    assert dropped.nonzero().flatten().tolist() == [0, 400]
    assert abs(clean) < 0.05


def test_every_row_start_is_a_sink() -> None:
    hidden = torch.randn(8, D)
    assert sink_mask(hidden, torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])).tolist() == [True, False, False, False] * 2


def test_no_evidence_is_nan_and_never_zero() -> None:
    features = _features(3, 64)
    features[1] = 0
    cka = cka_from_hsic(hsic_all_pairs(normalise_rows(features)))
    assert torch.isnan(cka[1]).all() and torch.isnan(cka[:, 1]).all()
    assert torch.isfinite(cka[0, 2])
    assert torch.isnan(cka_from_hsic(torch.zeros(2, 2))).all()


def test_too_short_a_block_adds_nothing() -> None:
    assert hsic_all_pairs(_features(2, 3)).abs().sum() == 0


def test_gated_gram_is_the_gram_of_gated_rows() -> None:
    features, gates = _features(3, 20), torch.rand(3, 20)
    direct = hsic_all_pairs(features * gates.unsqueeze(-1))
    torch.testing.assert_close(hsic_from_grams(gate_gram(gram(features), gates)), direct, rtol=1e-4, atol=1e-5)


def test_rows_are_normalised_and_zero_rows_stay_zero() -> None:
    rows = normalise_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.bfloat16))
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_cka_across_two_sets_equals_the_pairs_of_their_union() -> None:
    features = normalise_rows(_features(5, 60) + _related(60).sum(dim=0))
    whole = cka_from_hsic(hsic_all_pairs(features))
    grams = gram(features)
    across = cka_across(*hsic_across(grams[:3].clone(), grams[3:].clone()))
    torch.testing.assert_close(across, whole[:3, 3:], rtol=1e-4, atol=1e-5)


def test_cka_across_sums_blocks_first_and_knows_no_evidence() -> None:
    features = normalise_rows(_features(4, 80))
    features[0] = 0
    parts = [hsic_across(gram(part[:2]), gram(part[2:])) for part in features.split(40, dim=1)]
    summed = [sum(column) for column in zip(*parts, strict=True)]
    across = cka_across(*summed)
    assert torch.isnan(across[0]).all() and torch.isfinite(across[1]).all()
    torch.testing.assert_close(across[1], _blockwise_cka(features, 40)[1, 2:], rtol=1e-4, atol=1e-5)
    assert all(part.abs().sum() == 0 for part in hsic_across(gram(features[:2, :3]), gram(features[2:, :3])))
