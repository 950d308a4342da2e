"""The judge of exports: equal passes, a different function is refused with numbers, near-ties are not held against a file."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_edge.contracts.errors import GateFailed
from moe_edge.export import parity
from moe_edge.export.parity_pairs import agreement
from moe_edge.export.tokenizer_parity import ROUND_TRIP, check_tokenizer

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

    def routing_gaps(self, ids_S):
        return np.full(len(ids_S), 0.5)

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

    near_tie = np.where(np.arange(S) == 7, 1e-4, 0.5)
    row = parity.compare(replace(expected, gap_S=near_tie), Flips())
    assert row.max_abs_logit > 0.5 and row.median_kl_nats < 1e-9 and row.clear_tokens == S - 1
    assert row.clear_max_abs_logit == 0
    assert parity.require("gguf F16", row)["passed"] is True
    with pytest.raises(GateFailed, match="99th percentile of logit differences of tokens clear of ties"):
        parity.require("gguf F16", parity.compare(expected, Flips()))  # no router tie explains this flip


def test_quantized_files_are_reported_and_left_to_the_gates(expected):
    row = parity.require("gguf Q4_K_M", parity.compare(expected, FakeRuntime(noise=0.5)))
    assert row["passed"] is None and row["kl_nats"] > 0.01


def test_a_delivered_full_precision_file_is_limited_too(expected):
    with pytest.raises(GateFailed, match="gguf F16 delivered"):
        parity.require("gguf F16 delivered", parity.compare(expected, FakeRuntime(noise=0.5)))


def test_greedy_stops_counting_at_the_first_near_tie(expected):
    tied = replace(expected, margins=[1.0, 1.0, 0.01] + [1.0] * 13)
    assert parity.compare(tied, FakeRuntime()).greedy_compared == 2


def off(expected, amount):
    """The student's logits with every entry moved by up to an amount: a KL far below any limit on it."""
    shift_SV = np.random.default_rng(1).uniform(-amount, amount, expected.logits_SV.shape)

    class Off(FakeRuntime):
        def logits(self, ids_S):
            return (super().logits(ids_S) + shift_SV).astype(np.float32)

    return Off()


@pytest.mark.parametrize(
    ("kind", "good", "bad", "words"),
    [
        ("onnx fp32", 9e-5, 3e-4, "largest logit difference"),
        ("gguf F16", 4e-3, 2e-2, "99th percentile"),
    ],
)
def test_single_logits_are_limited_where_nearly_all_tokens_are_clear(expected, kind, good, bad, words):
    row = parity.require(kind, parity.compare(expected, off(expected, good)))
    assert row["rule"] == "logits and KL" and row["clear_tokens"] == S
    with pytest.raises(GateFailed, match=words):
        parity.require(kind, parity.compare(expected, off(expected, bad)))


@pytest.mark.parametrize("kind", ["gguf F16", "onnx fp32"])
def test_with_few_clear_tokens_the_kl_rule_alone_decides_and_says_so(expected, kind):
    few = replace(expected, gap_S=np.where(np.arange(S) < 3, 0.5, 1e-5))
    row = parity.require(kind, parity.compare(few, off(expected, 1e-3)))
    assert row["rule"] == "KL" and row["clear_tokens"] == 3 and row["n_tokens"] == S
    with pytest.raises(GateFailed, match="median KL"):
        parity.require(kind, parity.compare(few, FakeRuntime(noise=0.5)))
    none = parity.compare(replace(expected, gap_S=np.zeros(S)), FakeRuntime())
    assert none.clear_tokens == 0 and none.clear_max_abs_logit is None


def test_not_a_number_is_beyond_every_limit(expected):
    class Broken(FakeRuntime):
        def logits(self, ids_S):
            return np.full_like(super().logits(ids_S), np.nan)

    with pytest.raises(GateFailed, match="nan"):
        parity.require("gguf F16", parity.compare(expected, Broken()))


def test_perplexity_is_that_of_the_next_tokens(expected):
    row = parity.compare(expected, FakeRuntime(noise=0.3, seed=2))
    q = np.exp(FakeRuntime(noise=0.3, seed=2).logits(expected.ids_S).astype(np.float64))
    q /= q.sum(-1, keepdims=True)
    slow = np.exp(-np.mean([np.log(q[s, expected.ids_S[s + 1]]) for s in range(S - 1)]))
    assert row.perplexity == pytest.approx(slow, rel=1e-9)
    assert row.student_perplexity == pytest.approx(parity.perplexity(expected.logits_SV, expected.ids_S))


def test_the_two_formats_must_agree_at_full_precision(expected):
    near, far = (FakeRuntime(noise=noise, seed=4).logits(expected.ids_S) for noise in (1e-4, 0.6))
    row = agreement("gguf F16", "onnx fp32", near, expected.logits_SV, expected.logits_SV)
    assert row["passed"] is True and 0 <= row["kl_nats"] < 1e-6 and row["limit_kl_nats"] == 1e-2
    with pytest.raises(GateFailed, match="disagree with each other"):
        agreement("gguf F16", "onnx fp32", far, expected.logits_SV, expected.logits_SV)


def test_quantized_formats_may_differ_by_their_own_errors_and_no_more(expected):
    """Two independent errors pass; one file that answers the other's tokens does not."""
    student_SV = expected.logits_SV
    gguf, onnx = (FakeRuntime(noise=0.3, seed=seed).logits(expected.ids_S) for seed in (1, 2))
    row = agreement("gguf Q4_K_M delivered", "onnx int4 delivered", gguf, onnx, student_SV)
    assert row["passed"] is True and row["kl_nats"] < row["limit_kl_nats"]
    assert row["kl_to_student_nats"][0] == pytest.approx(parity.kl_of(student_SV, gguf).mean())
    # one file likes a token that the other excludes; the student hardly cares about it, so neither KL to it shows that
    likes, excludes, student = ([[np.log(1 - p), np.log(p)]] for p in (0.05, 1e-30, 1e-4))
    with pytest.raises(GateFailed, match="limit"):
        agreement("gguf Q4_K_M delivered", "onnx int4 delivered", *map(np.array, (likes, excludes, student)))


class Words:
    """A tokenizer of single characters."""

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(character) for character in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


class Asked:
    """An artifact whose own tokenizer may drop or add something, on the way in or out."""

    def __init__(self, change=lambda ids: ids, spoken=lambda raw: raw):
        self.change, self.spoken = change, spoken

    def tokenize(self, text):
        return self.change([ord(character) for character in text])

    def detokenize(self, ids):
        return self.spoken("".join(map(chr, ids)).encode())


def test_the_artifacts_own_tokenizer_must_be_the_students():
    same = check_tokenizer("gguf F16", Words(), Asked(), Path("x"))
    assert same == {"tokens": len(ROUND_TRIP), "equal": True, "text_returns": True}
    assert check_tokenizer("gguf F16", Words(), Asked(lambda ids: [1, *ids]), Path("x"))["equal"]  # automatic BOS
    with pytest.raises(GateFailed, match="(?s)is not the student's.*first difference at 3"):
        check_tokenizer("gguf F16", Words(), Asked(lambda ids: [*ids[:3], 7, *ids[4:]]), Path("x"))
    with pytest.raises(GateFailed, match="is not the student's"):
        check_tokenizer("gguf F16", Words(), Asked(lambda ids: ids[:-1]), Path("x"))


def test_the_artifact_must_decode_the_ids_as_the_student_does():
    """Equal ids with another table of pieces: what the device would show is not the student's text."""
    for spoken, place in (
        (lambda raw: raw.replace("ß".encode(), b"s"), ROUND_TRIP.index("ß")),
        (lambda raw: raw[:-1], -1),
    ):
        with pytest.raises(GateFailed, match="decodes the student's ids to another text") as failed:
            check_tokenizer("gguf F16", Words(), Asked(spoken=spoken), Path("x"))
        assert f"at character {place % len(ROUND_TRIP)}: " in str(failed.value)

    class Normalizing(Words):
        def decode(self, ids, **_):
            return super().decode(ids).casefold()

    told = check_tokenizer(
        "gguf F16", Normalizing(), Asked(spoken=lambda raw: raw.decode().casefold().encode()), Path("x")
    )
    assert told["equal"] and not told["text_returns"], "the student does not return the text, either"
