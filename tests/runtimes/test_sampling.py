"""Drawing a token: frequencies follow the softmax, truncation follows transformers, a row's numbers are its own."""

import numpy as np
import pytest
import torch
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.runtimes.sampling import GREEDY, Sampling, pick, row_generator

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
    generator, draws = np.random.default_rng(1), 4000
    counts = np.bincount([pick(LOGITS_V, sampling, generator) for _ in range(draws)], minlength=len(LOGITS_V))
    expected = probabilities(sampling).numpy()
    assert not counts[expected == 0].any()
    np.testing.assert_allclose(counts / draws, expected, atol=4 * 0.5 / np.sqrt(draws))


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert pick(np.array([1.0, 3.0, 3.0]), GREEDY, row_generator(0, "")) == 1


def test_impossible_tokens_are_never_drawn() -> None:
    logits_V = np.array([-np.inf, 0.0, -np.inf, -np.inf])
    assert {pick(logits_V, Sampling(), row_generator(seed, "row")) for seed in range(50)} == {1}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling()])
def test_broken_logits_are_refused(bad: float, sampling: Sampling) -> None:
    with pytest.raises(InputRejected, match="not finite"):
        pick(np.array([0.0, bad, 1.0]), sampling, row_generator(0, ""))
    with pytest.raises(InputRejected, match="not finite"):
        pick(np.full(3, -np.inf), sampling, row_generator(0, ""))


def test_a_rows_numbers_depend_on_seed_and_row_only() -> None:
    first = row_generator(10, "a").random(4)
    np.testing.assert_array_equal(row_generator(10, "a").random(4), first)
    assert not np.isin(
        first, np.concatenate([row_generator(20, "a").random(4), row_generator(10, "b").random(4)])
    ).any()


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_impossible_settings_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="impossible sampling"):
        Sampling(**values)
