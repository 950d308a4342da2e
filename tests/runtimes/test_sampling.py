"""Drawing a token: frequencies follow the softmax, truncation follows transformers, a row's numbers are its own."""

import numpy as np
import pytest
import torch
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.runtimes.sampling import GREEDY, RowNoise, Sampling, pick

LOGITS_V = np.random.default_rng(0).normal(0, 2, 12).astype(np.float32)


def probabilities(sampling: Sampling) -> torch.Tensor:
    """What transformers would draw from."""
    scores = TemperatureLogitsWarper(sampling.temperature)(None, torch.from_numpy(LOGITS_V)[None])
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(0.7), Sampling(top_k=4), Sampling(top_p=0.8), Sampling(1.3, 6, 0.9), Sampling(top_p=1e-9)],
)
def test_frequencies_follow_transformers(sampling: Sampling) -> None:
    noise, draws = RowNoise(1, "row"), 4000
    counts = np.bincount([pick(LOGITS_V, sampling, noise) for _ in range(draws)], minlength=len(LOGITS_V))
    expected = probabilities(sampling).numpy()
    assert not counts[expected == 0].any()
    np.testing.assert_allclose(counts / draws, expected, atol=4 * 0.5 / np.sqrt(draws))


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert pick(np.array([1.0, 3.0, 3.0]), GREEDY, RowNoise(0, "")) == 1


def test_impossible_tokens_are_never_drawn() -> None:
    logits_V = np.array([-np.inf, 0.0, -np.inf, -np.inf])
    assert {pick(logits_V, Sampling(), RowNoise(seed, "row")) for seed in range(50)} == {1}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling()])
def test_broken_logits_are_refused(bad: float, sampling: Sampling) -> None:
    with pytest.raises(InputRejected, match="not finite"):
        pick(np.array([0.0, bad, 1.0]), sampling, RowNoise(0, ""))
    with pytest.raises(InputRejected, match="not finite"):
        pick(np.full(3, -np.inf), sampling, RowNoise(0, ""))


def test_a_rows_numbers_depend_on_seed_row_and_position_only() -> None:
    noise = RowNoise(10, "a")
    first, second = noise.next(4), noise.next(4)
    again = RowNoise(10, "a")
    np.testing.assert_array_equal(again.next(9)[:4], first)  # a padded vocabulary changes nothing
    np.testing.assert_array_equal(again.next(4), second)
    others = [second, RowNoise(20, "a").next(4), RowNoise(10, "b").next(4)]
    assert not np.isin(first, np.concatenate(others)).any()


def test_nearly_equal_logits_draw_nearly_always_the_same_token() -> None:
    """The bound of the exponential race; inverting a cumulative distribution disagrees far more often."""
    generator = np.random.default_rng(0)
    logits_V = generator.normal(0, 2, 2000)
    other_V = logits_V + generator.normal(0, 0.02, 2000)
    p_V, q_V = (np.exp(one_V) / np.exp(one_V).sum() for one_V in (logits_V, other_V))
    distance = 0.5 * np.abs(p_V - q_V).sum()
    pairs = [
        (pick(logits_V, Sampling(), RowNoise(at, "x")), pick(other_V, Sampling(), RowNoise(at, "x")))
        for at in range(2000)
    ]
    disagreement = np.mean([one != two for one, two in pairs])
    assert 0 < disagreement < 2 * distance / (1 + distance) + 3 * np.sqrt(distance / 2000)


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_impossible_settings_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="impossible sampling"):
        Sampling(**values)
