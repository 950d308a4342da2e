"""The judge of exports: equal passes, a different function is refused with numbers, near-ties are not held against a file."""

from pathlib import Path

import numpy as np
import pytest

from moe_edge.contracts.errors import GateFailed
from moe_edge.exporting import parity
from moe_edge.exporting.parity_rows import (
    CLEAR_WANTED,
    GREEDY_TOKENS,
    Reference,
    clearest,
    reference,
    text_of,
)
from moe_edge.exporting.tokenizer_parity import ROUND_TRIP, check_tokenizer
from moe_edge.metrics.quality import kl_per_token, perplexity
from moe_edge.runtimes.base import generate

V, S = 11, 200


class FakeRuntime:
    """Logits from a table of token -> row, plus noise."""

    name, vocab, gap = "fake", V, 0.5

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

    def routing_gaps(self, rows):
        return [np.full(len(row), self.gap) for row in rows]

    def close(self):
        pass


class Tokenizer:
    chat_template = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(character) % V for character in text]}


TEXT = text_of(Tokenizer(), S)
SIZE = float(np.sqrt(np.square(FakeRuntime().logits(TEXT.ids_S)).mean()))  # of its logits, of which a share is rounding


def continuation(artifact) -> tuple[int, ...]:
    return tuple(generate(artifact, TEXT.prompt_ids, GREEDY_TOKENS))


def expected_by(student, *artifacts) -> Reference:
    return reference(student, TEXT, [continuation(one) for one in artifacts])


def compared(kind, artifact, student=None, family=""):
    """The row of an artifact, or GateFailed."""
    tokens = continuation(artifact)
    limits, _ = parity.limits_of(kind, family)
    found = parity.compare(reference(student or FakeRuntime(), TEXT, [tokens]), artifact, tokens, limits)
    return parity.require(kind, found, family)


@pytest.fixture
def expected():
    return expected_by(FakeRuntime(), FakeRuntime())


def test_an_equal_runtime_passes():
    row = compared("onnx fp32", FakeRuntime())
    assert row["passed"] is True and row["kl_nats"] == pytest.approx(0, abs=1e-9)
    assert row["greedy_equal"] == row["greedy_compared"] == GREEDY_TOKENS and row["n_tokens"] == S
    assert row["rule"] == "logits, KL and greedy" and row["clear_tokens"] == CLEAR_WANTED < row["clear_candidates"]


def test_kl_matches_a_float64_reference(expected):
    other = FakeRuntime(noise=0.3, seed=5)
    found = parity.compare(
        expected_by(FakeRuntime(), other), Replay(other, expected), continuation(FakeRuntime(noise=0.3, seed=5))
    )
    again = Replay(other, expected).logits(expected.ids_S).astype(np.float64)
    p = np.exp(expected.logits_SV.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    q = np.exp(again)
    q /= q.sum(-1, keepdims=True)
    kl_S = (p * np.log(p / q)).sum(-1)
    assert found.kl_nats == pytest.approx(kl_S.mean(), rel=1e-6)
    assert found.median_kl_nats == pytest.approx(np.median(kl_S), rel=1e-6)
    slow = np.exp(-np.mean([np.log(q[s, expected.ids_S[s + 1]]) for s in range(S - 1)]))
    assert found.perplexity == pytest.approx(slow, rel=1e-9)
    assert found.student_perplexity == pytest.approx(perplexity(expected.logits_SV, expected.ids_S))


class Replay(FakeRuntime):
    """Says the same logits of the text every time."""

    known: dict = {}

    def __init__(self, source, expected):
        super().__init__()
        self.logits_SV = self.known.setdefault(id(source), source.logits(expected.ids_S))

    def logits(self, ids_S):
        return self.logits_SV if len(ids_S) == S else super().logits(ids_S)


def test_limits_grow_with_the_size_of_the_logits():
    row = compared("gguf F16", Off(1.6e-3 * SIZE))
    assert row["passed"] and row["logit_scale"] == pytest.approx(SIZE)
    assert row["limits"]["clear_p99_abs_logit"] == pytest.approx(5e-3 * SIZE)
    small, off = FakeRuntime(scale=0.2), Off(8e-3)
    off.table_VV = small.table_VV
    with pytest.raises(GateFailed, match="99th percentile .* > 5e-03"):  # logits below 1 count as 1
        compared("gguf F16", off, small)
    with pytest.raises(GateFailed, match="largest logit difference"):
        compared("onnx fp32", Off(8e-3))


@pytest.mark.parametrize("kind", ["gguf F16", "onnx fp32", "gguf F16 delivered", "onnx fp32 (the first 2 of 4 layers)"])
def test_another_function_is_refused_with_numbers(kind):
    with pytest.raises(GateFailed, match=r"(?s)the .* export does not.*median KL is .* nats; mean KL is .* nats"):
        compared(kind, FakeRuntime(noise=0.5))


class Off(FakeRuntime):
    """The student's logits, some of them moved."""

    def __init__(self, amount, of=lambda ids_S: np.ones(len(ids_S), bool)):
        super().__init__()
        self.amount, self.of = amount, of

    def logits(self, ids_S):
        shift_SV = np.random.default_rng(1).uniform(-self.amount, self.amount, (len(ids_S), V))
        return (super().logits(ids_S) + shift_SV * self.of(ids_S)[:, None]).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "good", "bad", "tokens"),
    [
        ("onnx fp32", 9e-5 * SIZE, 3e-4 * SIZE, "largest logit difference"),
        ("gguf F16", 4.9e-3 * SIZE, 6e-3 * SIZE, "99th percentile"),
    ],
)
def test_single_logits_of_clear_tokens_are_limited(kind, good, bad, tokens):
    assert compared(kind, Off(good))["rule"] == "logits, KL and greedy"
    with pytest.raises(GateFailed, match=tokens):
        compared(kind, Off(bad))


class Ties(FakeRuntime):
    """A student with a near-tie at every token 7."""

    def __init__(self, near=1e-4):
        super().__init__()
        self.near = near

    def routing_gaps(self, rows):
        return [np.where(row == 7, self.near, 0.5) for row in rows]


def flipped(ids_S):
    """What a flip at every token 7 moves: that token and, through attention, the rest of its row."""
    return np.maximum.accumulate(ids_S == 7)


@pytest.mark.parametrize(("kind", "amount"), [("gguf F16", 0.04), ("onnx fp32", 3e-3)])
def test_only_what_lies_before_a_rows_first_near_tie_is_compared_number_by_number(kind, amount):
    faithful = Off(amount, of=flipped)  # its KL over all tokens is below the limits on that
    row = compared(kind, faithful, Ties())
    assert (
        row["rule"] == "logits, KL and greedy" and row["max_abs_logit"] > amount / 2 and row["clear_max_abs_logit"] == 0
    )
    assert 100 <= row["clear_tokens"] <= CLEAR_WANTED + 8
    with pytest.raises(GateFailed, match="of tokens clear of ties"):
        compared(kind, faithful)  # no router tie explains it


def test_float16_products_may_flip_where_float32_may_not():
    """A gap between the two bands: such tokens count for ONNX, not for GGUF."""

    class Narrow(FakeRuntime):
        gap = 2e-3

    with pytest.raises(GateFailed, match="largest logit difference"):
        compared("onnx fp32", Off(3e-3), Narrow())
    assert compared("gguf F16", Off(0.02), Narrow())["clear_tokens"] == 0


def test_the_mean_kl_over_all_tokens_is_limited():
    """Some tokens are wrong, none of them clear of ties: neither the median nor single logits see it."""
    with pytest.raises(GateFailed, match=r"why:   mean KL is .* > 1e-03 nats$"):
        compared("gguf F16", Off(4.0, of=lambda ids_S: ids_S == 7), Ties())


def test_without_clear_tokens_the_row_says_so_and_the_kl_decides():
    class AllTied(FakeRuntime):
        gap = 1e-5

    row = compared("gguf F16", Off(1e-3), AllTied())
    assert row["rule"] == "KL and greedy" and row["clear_tokens"] == 0 and row["clear_max_abs_logit"] is None
    assert row["looser_because"] == "0 tokens are clear of router ties, 100 are needed"
    assert row["limits"]["kl_nats"] == 5e-3 and row["limits"]["clear_p99_abs_logit"] is None
    assert compared("onnx fp32", Off(1e-5), AllTied())["looser_because"].startswith("0 tokens")
    for kind in ("gguf F16", "onnx fp32"):
        with pytest.raises(GateFailed, match="median KL"):
            compared(kind, FakeRuntime(noise=0.5), AllTied())


def test_a_looser_limit_is_that_of_one_family_and_says_why():
    row = compared("gguf F16", Off(8e-3 * SIZE), family="qwen3_5_moe")
    assert "linear attention" in row["looser_because"]
    assert row["limits"]["clear_p99_abs_logit"] == pytest.approx(1e-2 * SIZE)
    for family in ("qwen3_moe", ""):
        with pytest.raises(GateFailed, match="99th percentile"):
            compared("gguf F16", Off(8e-3 * SIZE), family=family)
    assert set(parity.LOOSER) == {("gguf F16", "qwen3_5_moe")}, "every further one needs numbers of its own"


class Says(FakeRuntime):
    """Decodes at one place what its logits over whole rows do not say."""

    def prefill(self, ids_S):
        self.done = 0
        return super().prefill(ids_S)

    def step(self, token):
        self.done += 1
        logits_V = super().step(token)
        return -logits_V if self.done == 3 else logits_V


@pytest.mark.parametrize("kind", ["gguf F16", "onnx fp32"])
def test_a_wrong_greedy_token_fails_both_formats(kind):
    with pytest.raises(GateFailed, match=f"greedy tokens differ at 3 of {GREEDY_TOKENS}"):
        compared(kind, Says())
    assert compared("gguf Q4_K_M", Says())["greedy_equal"] == 3  # told, and left to the gates


@pytest.mark.parametrize(("kind", "tie"), [("gguf F16", 1.5e-2), ("onnx fp32", 5e-4)])
def test_a_tied_greedy_token_is_as_good_and_does_not_end_the_comparison(kind, tie):
    """The student's second-best token within the tie; the artifact says it, and goes on."""

    class Tied(FakeRuntime):
        def __init__(self, second):
            super().__init__()
            order_V = np.argsort(self.table_VV, axis=1)
            best, other = (order_V[:, -1], order_V[:, -2])
            rows = np.arange(V)
            top = self.table_VV[rows, best].copy()
            self.table_VV[rows, other] = top - tie / 2 if not second else top + 1e-5

    student, artifact = Tied(False), Tied(True)
    tokens = continuation(artifact)
    assert tokens != continuation(student)
    judged = reference(student, TEXT, [tokens])
    found = parity.compare(judged, artifact, tokens, parity.limits_of(kind, "")[0])
    assert found.greedy_equal == found.greedy_compared == GREEDY_TOKENS
    assert max(judged.greedy[tokens].shortfalls) == pytest.approx(tie / 2, rel=0.1)


def test_after_a_router_tie_a_greedy_token_may_be_off_by_what_the_text_is():
    def differs(off_logits, gap):
        student = parity.Greedy([0.0, 0.3, 0.0], [0.5, gap, gap])
        return parity.agreed_tokens(student, parity.LIMITS["gguf F16"], off_logits)

    assert differs(0.4, gap=1e-4) == 3 and differs(0.2, gap=1e-4) == 1 and differs(0.4, gap=0.5) == 1


def test_quantized_files_are_reported_and_left_to_the_gates():
    row = compared("gguf Q4_K_M", FakeRuntime(noise=0.5))
    assert row["passed"] is None and row["kl_nats"] > 0.01


def test_not_a_number_is_beyond_every_limit():
    class Broken(FakeRuntime):
        def logits(self, ids_S):
            return np.full_like(super().logits(ids_S), np.nan)

    with pytest.raises(GateFailed, match="nan"):
        compared("gguf F16", Broken())


def test_clear_rows_end_before_their_first_tie_and_the_firmest_come_first():
    rows = [np.arange(4) + 10 * n for n in range(4)]
    gaps = [np.array(g) for g in ([0.5, 0.5, 1e-4, 0.5], [1e-4] * 4, [2e-3, 2e-3, 2e-3, 2e-3], [0.5, 0.5, 0.5, 3e-3])]
    found = clearest(rows, gaps)
    assert [ids.tolist() for ids, _ in found] == [[30, 31, 32, 33], [0, 1], [20, 21, 22, 23]]
    assert found[0][1].tolist() == [0.5, 0.5, 0.5, 3e-3]
    many = clearest([np.arange(8)] * 100, [np.full(8, np.inf)] * 100)
    assert sum(len(ids) for ids, _ in many) == CLEAR_WANTED


FULL = {"kl_nats": 1e-3, "median_kl_nats": 1e-3}


def test_the_two_formats_must_agree_at_full_precision(expected):
    near, far = (FakeRuntime(noise=noise, seed=4).logits(expected.ids_S) for noise in (1e-4, 0.6))
    row = parity.agree("gguf F16", "onnx fp32", near, expected.logits_SV, expected.logits_SV, FULL)
    assert row["passed"] is True and 0 <= row["kl_nats"] < 1e-6 and row["limit_kl_nats"] == 1e-3
    with pytest.raises(GateFailed, match="disagree with each other"):
        parity.agree("gguf F16", "onnx fp32", far, expected.logits_SV, expected.logits_SV, FULL)


def test_quantized_formats_may_differ_by_their_own_errors_and_no_more(expected):
    """Two independent errors pass; one file that answers the other's tokens does not."""
    student_SV = expected.logits_SV
    gguf, onnx = (FakeRuntime(noise=0.3, seed=seed).logits(expected.ids_S) for seed in (1, 2))
    row = parity.agree("gguf Q4_K_M delivered", "onnx int4 delivered", gguf, onnx, student_SV)
    assert row["passed"] is True and row["kl_nats"] < row["limit_kl_nats"]
    assert row["kl_to_student_nats"][0] == pytest.approx(kl_per_token(student_SV, gguf).mean())
    # one file likes a token that the other excludes; the student hardly cares about it, so neither KL to it shows that
    likes, excludes, student = ([[np.log(1 - p), np.log(p)]] for p in (0.05, 1e-30, 1e-4))
    with pytest.raises(GateFailed, match="limit"):
        parity.agree("gguf Q4_K_M delivered", "onnx int4 delivered", *map(np.array, (likes, excludes, student)))


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

    found = check_tokenizer(
        "gguf F16", Normalizing(), Asked(spoken=lambda raw: raw.decode().casefold().encode()), Path("x")
    )
    assert found["equal"] and not found["text_returns"], "the student does not return the text, either"
