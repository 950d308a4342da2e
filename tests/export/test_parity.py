"""The judge of exports: equal passes, a different function is refused with numbers, near-ties are not held against a file."""

import numpy as np
import pytest

from moe_edge.contracts.errors import GateFailed
from moe_edge.export import parity

V, S = 11, 40


class FakeRuntime:
    """Logits from a table of token -> row, plus noise."""

    name, vocab = "fake", V

    def __init__(self, noise=0.0, scale=5.0, seed=0):
        self.table_VV = np.random.default_rng(3).normal(size=(V, V)) * scale
        self.random, self.noise = np.random.default_rng(seed), noise

    def _rows(self, ids):
        clean = self.table_VV[np.asarray(ids)]
        return (clean + self.noise * self.random.normal(size=clean.shape)).astype(np.float32)

    def logits(self, ids_S):
        return self._rows(ids_S)

    def prefill(self, ids_S):
        return self._rows(ids_S)[-1]

    def step(self, token):
        return self._rows([token])[0]

    def close(self):
        pass


class Tokenizer:
    chat_template = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(character) % V for character in text]}


@pytest.fixture
def expected():
    return parity.reference(FakeRuntime(), Tokenizer(), S)


def test_an_equal_runtime_passes(expected):
    row = parity.require("onnx fp32", parity.compare(expected, FakeRuntime()))
    assert row["passed"] is True and row["kl_nats"] == pytest.approx(0, abs=1e-9)
    assert row["greedy_equal"] >= row["greedy_compared"] and row["n_tokens"] == S


def test_kl_matches_a_float64_reference(expected):
    other = FakeRuntime(noise=0.3, seed=5)
    row = parity.compare(expected, other)
    again = FakeRuntime(noise=0.3, seed=5).logits(expected.ids_S).astype(np.float64)
    p = np.exp(expected.logits_SV.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    q = np.exp(again)
    q /= q.sum(-1, keepdims=True)
    kl_S = (p * np.log(p / q)).sum(-1)
    assert row.kl_nats == pytest.approx(kl_S.mean(), rel=1e-6)
    assert row.median_kl_nats == pytest.approx(np.median(kl_S), rel=1e-6)


@pytest.mark.parametrize("kind", ["gguf F16", "onnx fp32"])
def test_another_function_is_refused_with_numbers(expected, kind):
    with pytest.raises(GateFailed, match="median KL is .* nats"):
        parity.require(kind, parity.compare(expected, FakeRuntime(noise=0.5)))


def test_one_flipped_token_is_not_a_wrong_conversion(expected):
    class Flips(FakeRuntime):
        def logits(self, ids_S):
            rows = super().logits(ids_S)
            rows[7] += np.linspace(0, 0.6, V, dtype=np.float32)
            return rows

    row = parity.compare(expected, Flips())
    assert row.max_abs_logit > 0.5 and row.median_kl_nats < 1e-9
    assert parity.require("gguf F16", row)["passed"] is True


def test_quantized_files_are_reported_and_left_to_the_gates(expected):
    row = parity.require("gguf Q4_K_M", parity.compare(expected, FakeRuntime(noise=0.5)))
    assert row["passed"] is None and row["kl_nats"] > 0.01


def test_greedy_stops_counting_at_the_first_near_tie(expected):
    tied = parity.Reference(
        expected.ids_S, expected.logits_SV, expected.prompt_ids, expected.greedy, [1.0, 1.0, 0.01] + [1.0] * 13
    )
    assert parity.compare(tied, FakeRuntime()).greedy_compared == 2
