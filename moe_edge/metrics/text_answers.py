"""One answer and what became of it: a status per row, and the two signs of a model that runs in circles.

An untrained or broken student answers with nothing, with half a character, or with one phrase for ever. None of this may
stop an evaluation or change how many rows it counts: the answer gets a status, its text is what can be read of it
(perhaps nothing), and the metrics score that.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Literal, NamedTuple

import numpy as np

from moe_edge.texts.instruction_rows import clean_text

# An answer is "repeated" when so long a tail consists of so many equal parts, or when so long an answer has so few
# different 4-grams: prose of this length has 0.9 and more.
LOOP_TOKENS, LOOP_REPEATS, FEW_DISTINCT = 16, 3, 0.5
NGRAM = 4
REPLACEMENT = "\ufffd"


class Status(StrEnum):
    """What became of a row; where several hold, the first of this list."""

    EXCEPTION = "exception"  # the runtime failed; no text
    DECODE_ERROR = "decode_error"  # tokens that are no text: the readable rest is scored
    EMPTY = "empty"  # no token before the end, or nothing but space and control characters
    REPEATED = "repeated"  # the tail is one phrase over and over, or half of the answer is
    TRUNCATED = "truncated"  # no end within the allowed tokens
    OK = "ok"


@dataclass(frozen=True)
class Answer:
    """One answer as it is kept and scored.

    `finish`: "stop" an end token came, "length" the tokens ran out, None the runtime failed. `distinct_4`: different 4-grams of
    tokens over all of them (Li et al. 2016), None below four tokens. `looping_tokens`: tokens of the longest tail that
    is one phrase at least twice in a row.
    """

    status: Status
    text: str
    finish: Literal["stop", "length"] | None = None
    n_tokens: int = 0
    distinct_4: float | None = None
    looping_tokens: int = 0
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data; `from_dict` reads it."""
        return asdict(self) | {"status": self.status.value}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Answer":
        """Raises ValueError or TypeError for anything but what `to_dict` gives."""
        return cls(**{**data, "status": Status(data["status"]), "text": clean_text(data["text"])})


def failed(error: Exception) -> Answer:
    """The answer of a row whose runtime raised."""
    first_line = (str(error).strip().splitlines() or [""])[0]
    return Answer(Status.EXCEPTION, "", error=f"{type(error).__name__}: {first_line}")


def judge_answer(tokens: Sequence[int], text: str | None, max_new_tokens: int, error: str | None = None) -> Answer:
    """The status of an answer.

    Args:
        tokens: what the model wrote, without the stop token.
        text: the tokens as text, None when they could not be decoded.
        max_new_tokens: how many it was allowed.
        error: why there is no text.
    """
    finish: Literal["stop", "length"] = "length" if len(tokens) >= max_new_tokens else "stop"
    # the last character may be cut in half by the length, which is no error
    readable = (text or "").rstrip(REPLACEMENT) if finish == "length" else (text or "")
    cleaned = clean_text(readable)
    status = Status.OK
    if text is None or REPLACEMENT in readable:
        status = Status.DECODE_ERROR
    elif not cleaned:
        status = Status.EMPTY
    elif runs_in_circles(tokens):
        status = Status.REPEATED
    elif finish == "length":
        status = Status.TRUNCATED
    return Answer(status, cleaned, finish, len(tokens), distinct_ngrams(tokens), looping_tail(tokens)[0], error)


def runs_in_circles(tokens: Sequence[int]) -> bool:
    """True for what a reader would call a loop."""
    loop, repeats = looping_tail(tokens)
    few = len(tokens) >= LOOP_TOKENS and (distinct_ngrams(tokens) or 1.0) <= FEW_DISTINCT
    return few or (loop >= LOOP_TOKENS and repeats >= LOOP_REPEATS)


def distinct_ngrams(tokens: Sequence[int], n: int = NGRAM) -> float | None:
    """Different n-grams over all n-grams, 1 = nothing repeats; None when there is none."""
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def looping_tail(tokens: Sequence[int]) -> tuple[int, int]:
    """(tokens, repetitions) of the longest tail that is one phrase at least twice in a row; (0, 0) when nothing repeats.

    Of phrases with equally long tails the shortest counts; an incomplete first repetition counts to the tokens.
    """
    found = repeated_suffix(tokens)
    tail = found.length + found.period
    return (tail, tail // found.period) if found.length else (0, 0)


class RepeatedSuffix(NamedTuple):
    """The end of a text that only says again what stands before it."""

    length: int  # tokens that equal those one period earlier; 0: nothing is repeated
    period: int  # tokens of what is repeated; 0 where nothing is

    def share(self, tokens: int) -> float:
        """Of a text of so many tokens."""
        return self.length / tokens if tokens else 0.0


def repeated_suffix(ids_N: Sequence[int] | np.ndarray) -> RepeatedSuffix:
    """The longest end of the text that repeats what came one period before, at least one whole period of it.

    "a b c b c b c" ends in two repetitions of "b c": length 4, period 2. Cutting the last `length` tokens leaves the first
    copy. Of equally long ones the shortest period is named.
    """
    ids = np.asarray(ids_N)
    best = RepeatedSuffix(0, 0)
    for period in range(1, len(ids) // 2 + 1):
        differs = np.flatnonzero(ids[period:] != ids[:-period])
        length = len(ids) - period - (int(differs[-1]) + 1 if len(differs) else 0)
        if length >= period and length > best.length:
            best = RepeatedSuffix(length, period)
    return best
