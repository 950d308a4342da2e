"""Two tokenizers on one text: are they the same, which tokens do they share, and where do their tokenizations meet.

Distillation between models of different tokenizers that treats their ids as one vocabulary trains towards noise without
any sign of it. So the difference is found first, named, and refused unless a loss that bridges it is asked for.

Shape suffixes: A student tokens, B teacher tokens of one row, M matched tokens.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe_edge.contracts.errors import InputRejected
from moe_edge.formulas.uld import shared_boundaries
from moe_edge.models.token_bytes import token_bytes

ROLES = ("eos_token", "bos_token", "pad_token")
MARK = b"\xff"  # in no UTF-8 text: what begins with it is a special token that both sides have


def tokenizer_differences(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> list[str]:
    """What makes two tokenizers give different ids, in words; empty when nothing does."""
    ours, theirs = one.get_vocab(), other.get_vocab()
    found = []
    if len(ours) != len(theirs):
        found.append(f"{len(ours)} and {len(theirs)} tokens")
    moved = [token for token, index in ours.items() if theirs.get(token) != index]
    if moved:
        example = min(moved, key=ours.__getitem__)
        there = f"id {theirs[example]}" if example in theirs else "missing"
        found.append(f"{len(moved)} tokens with another id, first {example!r}: id {ours[example]} and {there}")
    found += [
        f"{role} is {getattr(one, role)!r} and {getattr(other, role)!r}"
        for role in ROLES
        if getattr(one, role) != getattr(other, role)
    ]
    parts = [json.loads(side.backend_tokenizer.to_str()) for side in (one, other)]
    for name in ("normalizer", "pre_tokenizer"):
        if parts[0].get(name) != parts[1].get(name):
            found.append(f"another {name}")
    if not moved and parts[0]["model"].get("merges") != parts[1]["model"].get("merges"):
        found.append("other merges")
    return found


def require_same_tokenizer(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, losses: Collection[str]
) -> None:
    """Refuse losses that compare teacher and student token by token where their tokens differ.

    Args:
        losses: the active losses that do so; with none of them any two tokenizers are fine.

    Raises:
        InputRejected: naming the differences.
    """
    differences = tokenizer_differences(student, teacher)
    if losses and differences:
        raise InputRejected(
            "student and teacher have different tokenizers",
            where=f"distill.stages: losses {', '.join(sorted(losses))}",
            why="; ".join(differences),
            next_command="use the loss 'projected_kl' or 'uld' in their place, or a student with the teacher's tokenizer",
        )


@dataclass(frozen=True)
class AlignedRow:
    """One row in the teacher's tokens, and where both tokenizations meet."""

    teacher_ids: list[int]
    places_P2: Tensor  # (student place, teacher place), each the last token of the same text
    next_P2: Tensor  # where they meet again; -1, -1 = never


class TokenizerPair:
    """Turns rows of the student's ids into the teacher's.

    Special tokens with the same role (end, beginning, padding) or the same text in both are one and the same; a special
    token of the student that the teacher lacks is plain text to it.

    Raises:
        InputRejected: a tokenizer whose tokens are not bytes; see `token_bytes`.
    """

    def __init__(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
        self._teacher = teacher
        self._student_bytes, self._teacher_bytes = token_bytes(student), token_bytes(teacher)
        self._special: dict[bytes, int] = {}  # mark -> the teacher's id
        for mark, ours, theirs in _common_specials(student, teacher):
            self._student_bytes[ours] = self._teacher_bytes[theirs] = mark
            self._special[mark] = theirs
        marked = set(self._special.values())
        self._lonely = {
            index for index, token in teacher.added_tokens_decoder.items() if token.special and index not in marked
        }
        first = teacher("a")["input_ids"][:1]
        self._prefix = first if first and first[0] == teacher.bos_token_id else []

    def matched(self, teacher_rows: int, student_rows: int) -> Tensor:
        """(teacher id, student id) of the tokens that are the same bytes, int64 [M, 2], by student id.

        Args:
            teacher_rows, student_rows: rows of the heads; ids beyond them do not count.
        """
        theirs = {text: index for index, text in enumerate(self._teacher_bytes[:teacher_rows]) if text}
        ours = {text: index for index, text in enumerate(self._student_bytes[:student_rows]) if text}
        pairs = [(theirs[text], index) for text, index in ours.items() if text in theirs]
        return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)

    def begins(self, teacher_rows: int, student_rows: int) -> Tensor:
        """The student's longest token that each of the teacher's tokens begins with, int64 [V]; -1 where there is none."""
        ours = {text: index for index, text in enumerate(self._student_bytes[:student_rows]) if text}
        found = []
        for index, text in enumerate(self._teacher_bytes[:teacher_rows]):
            shortest = len(text) if text.startswith(MARK) else 1
            lengths = () if index in self._lonely else range(len(text), shortest - 1, -1)
            found.append(next((ours[text[:length]] for length in lengths if text[:length] in ours), -1))
        return torch.tensor(found)

    def align(self, ids: Sequence[int]) -> AlignedRow | None:
        """A row of the student's ids in the teacher's tokens; None where the teacher's tokenizer changes the text.

        A row may begin and end within a character. The places where it ends do not count: what is cut there may be half
        a word.
        """
        pieces = [self._student_bytes[index] for index in ids]
        student_ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
        teacher_ids, teacher_ends, start = list(self._prefix), [0] * len(self._prefix), 0
        for segment in _segments(pieces):
            skipped, text = (0, "") if segment in self._special else _readable(segment, at_start=not start)
            found = ([self._special[segment]], [len(segment)]) if segment in self._special else self._encoded(text)
            if found is None:
                return None
            teacher_ids += found[0]
            teacher_ends += [start + skipped + end for end in accumulate(found[1])]
            start += len(segment)
            if segment not in self._special and skipped + len(text.encode()) < len(segment):
                break  # unreadable bytes: what follows has another context
        places_P2 = shared_boundaries(student_ends, torch.tensor(teacher_ends, dtype=torch.long))
        next_P2 = torch.cat([places_P2[1:], places_P2.new_full((min(1, len(places_P2)), 2), -1)])
        inside_P = (places_P2[:, 0] < len(ids) - 1) & (places_P2[:, 1] < len(teacher_ids) - 1)
        return AlignedRow(teacher_ids, places_P2[inside_P], next_P2[inside_P])

    def _encoded(self, text: str) -> tuple[list[int], list[int]] | None:
        """The teacher's ids of a text and their lengths in bytes; None where they do not add up to it."""
        ids = self._teacher(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
        pieces = [self._teacher_bytes[index] for index in ids]
        whole = text.encode()
        lengths = [len(piece) for piece in pieces]
        if b"".join(pieces) == b" " + whole:  # SentencePiece puts a space before a text
            lengths[0] -= 1
            return ids, lengths
        return (ids, lengths) if b"".join(pieces) == whole else None


def _common_specials(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> list[tuple[bytes, int, int]]:
    """(mark, id, id) of the special tokens that both have; a token with two roles keeps the first."""
    ours, theirs = (
        {token.content: index for index, token in side.added_tokens_decoder.items() if token.special}
        for side in (one, other)
    )
    pairs = [(getattr(one, role), getattr(other, role)) for role in ROLES] + [(text, text) for text in ours]
    found: dict[int, tuple[bytes, int, int]] = {}
    for our_text, their_text in pairs:
        if our_text not in ours or their_text not in theirs or ours[our_text] in found:
            continue
        if theirs[their_text] not in {theirs_index for _, _, theirs_index in found.values()}:
            mark = MARK + our_text.encode()
            found[ours[our_text]] = (mark, ours[our_text], theirs[their_text])
    return list(found.values())


def _segments(pieces: Sequence[bytes]) -> list[bytes]:
    """Runs of ordinary tokens joined, special tokens alone."""
    segments: list[bytes] = []
    open_run = False
    for piece in pieces:
        special = piece.startswith(MARK) and len(piece) > 1
        if open_run and not special:
            segments[-1] += piece
        else:
            segments.append(piece)
        open_run = not special
    return segments


def _readable(segment: bytes, at_start: bool) -> tuple[int, str]:
    """(bytes skipped, text): the first stretch of valid UTF-8; a row may begin within a character."""
    skipped = 0
    while at_start and skipped < min(3, len(segment)) and 0x80 <= segment[skipped] < 0xC0:
        skipped += 1
    rest = segment[skipped:]
    try:
        return skipped, rest.decode()
    except UnicodeDecodeError as error:
        return skipped, rest[: error.start].decode()
