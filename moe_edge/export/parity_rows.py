"""The tokens that parity is judged on, and what the student says of them.

The text is read whole, for KL, agreement and perplexity. Beside it stand short rows cut from it, because a token whose
routing is a near-tie spoils the comparison of all later tokens of its row: a short row often has none. Of these rows the
student tells the gaps first, and only those parts are compared that are clear of ties.

The greedy tokens are the artifact's own, and the student is asked at each of them how near it is to its own choice. Up to the
first disagreement that is the student's greedy answer; a near-tie does not end the comparison; and it costs one pass, also
for a student that is read layer by layer.

Shape suffixes: S tokens, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from moe_edge.models.chat_template import render_chat
from moe_edge.runtimes.base import LogitModel

NEAR_TIE_GAP = 1e-3  # router gap (models/routing.py) below which a runtime may choose another expert
FIRM_GAP = 5e-3  # the same for float16 products
GREEDY_TOKENS = 16
ROW_TOKENS = 8  # of a short row
CANDIDATES = 64  # short rows that are looked at
CLEAR_WANTED = 256  # tokens
TEXT = (
    "The lighthouse keeper counted the ships every evening and wrote their names in a long blue book. On the third of May, "
    '12 of them came back; the other 7 had sailed north, where the herring were. "Will they return?" asked his daughter. '
    "He did not know. In Zürich and in São Paulo people read about it in the newspaper, and a professor of mathematics "
    "computed the odds: 0.35, or 1 in 3. What should a captain do when the wind turns? First, reef the sails. Second, "
    "keep the bow to the waves. Third, wait for the morning. def steer(angle): return angle * 0.5  # half of what you think"
)
PROMPT = "What is the capital of France?"


class Student(LogitModel, Protocol):
    """The Hugging Face student: `runtimes.hf.HfRuntime`, or layer by layer `runtimes.hf_streamed.StreamedStudent`."""

    def routing_gaps(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Smallest router gap of every token of every row, [S] each; `logits` of these rows may be asked for next."""
        ...


@dataclass(frozen=True)
class Text:
    """The text as the student's tokens."""

    ids_S: np.ndarray
    prompt_ids: list[int]  # of the question

    @property
    def short_rows(self) -> list[np.ndarray]:
        """Rows of ROW_TOKENS tokens that begin all over the text."""
        last = len(self.ids_S) - ROW_TOKENS
        return [self.ids_S[at : at + ROW_TOKENS] for at in range(0, last + 1, max(1, -(-last // CANDIDATES)))]


@dataclass(frozen=True)
class ClearRow:
    """The beginning of a short row that is clear of ties."""

    ids_S: np.ndarray
    logits_SV: np.ndarray
    gap_S: np.ndarray  # smallest up to each token, falling


@dataclass(frozen=True)
class Greedy:
    """What the student thinks of every token of an artifact's greedy continuation."""

    shortfalls: list[float]  # its best logit minus that of the token: 0 where it would have chosen the same
    gaps: list[float]  # smallest router gap of all tokens up to there, those of the prompt, too


@dataclass(frozen=True)
class Reference:
    """What the student says on the text, the short rows and the prompt."""

    ids_S: np.ndarray
    logits_SV: np.ndarray
    clear_rows: list[ClearRow]
    candidates: int  # tokens of short rows that were looked at
    prompt_ids: list[int]
    greedy: dict[tuple[int, ...], Greedy]  # by the artifact's own continuation of the prompt


def prompt_ids(tokenizer: Any) -> list[int]:
    """The fixed question as the model's chat, or as plain text where there is no template.

    Raises:
        InputRejected: the tokenizer's chat template is broken or hostile.
    """
    if getattr(tokenizer, "chat_template", None):
        text = render_chat(tokenizer, [{"role": "user", "content": PROMPT}], add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(PROMPT)["input_ids"])


def text_of(tokenizer: Any, max_tokens: int) -> Text:
    """The text and the question in at most `max_tokens` tokens each."""
    ids_S = np.asarray(tokenizer(TEXT)["input_ids"][:max_tokens], dtype=np.int64)
    return Text(ids_S, prompt_ids(tokenizer)[-max_tokens:])


def reference(
    student: Student, text: Text, continuations: Iterable[Sequence[int]], also: Sequence[np.ndarray] = ()
) -> Reference:
    """Let the student read everything at once.

    Args:
        continuations: the artifacts' greedy tokens after the prompt.
        also: further rows that the caller will ask the student for.
    """
    distinct = sorted({tuple(tokens) for tokens in continuations})
    answers = [np.asarray([*text.prompt_ids, *tokens[:-1]], dtype=np.int64) for tokens in distinct]
    short = text.short_rows
    gaps = student.routing_gaps([*short, *answers, text.ids_S, *also])
    clear = [ClearRow(ids_S, student.logits(ids_S), gap_S) for ids_S, gap_S in clearest(short, gaps[: len(short)])]
    rows = zip(distinct, answers, gaps[len(short) : len(short) + len(answers)], strict=True)
    greedy = {tokens: _greedy_of(student.logits(row), gap_S, tokens) for tokens, row, gap_S in rows}
    return Reference(text.ids_S, student.logits(text.ids_S), clear, sum(map(len, short)), text.prompt_ids, greedy)


def clearest(rows: Sequence[np.ndarray], gaps: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids [S], smallest gaps up to each token [S]) of rows, or of their beginnings, that are clear of ties.

    Those with the most tokens beyond FIRM_GAP first, then the longest, until there are CLEAR_WANTED tokens.
    """
    smallest = [np.minimum.accumulate(gap_S) for gap_S in gaps]
    lengths = [int((gap_S > NEAR_TIE_GAP).sum()) for gap_S in smallest]
    firm = [int((gap_S > FIRM_GAP).sum()) for gap_S in smallest]
    order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: (-firm[row], -lengths[row]))
    found, tokens = [], 0
    for row in order:
        if tokens >= CLEAR_WANTED:
            break
        found.append((rows[row][: lengths[row]], smallest[row][: lengths[row]]))
        tokens += lengths[row]
    return found


def _greedy_of(logits_SV: np.ndarray, gap_S: np.ndarray, continuation: Sequence[int]) -> Greedy:
    """The student on a row that ends before the last token of a continuation."""
    length = len(continuation)
    last_TV = logits_SV[-length:]
    shortfall_T = last_TV.max(-1) - last_TV[np.arange(length), list(continuation)]
    return Greedy(shortfall_T.tolist(), np.minimum.accumulate(gap_S)[-length:].tolist())
