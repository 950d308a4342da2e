"""From text to packed token rows: the calibration set of the profile pass, and the held-out set that judges artifacts.

Documents are drawn by seed, always from the source that is furthest behind its share, joined into one stream and
cut into rows of full length: no padding, so that every row costs and counts the same. Too little text gives fewer
rows and says so; nothing is repeated, because repeated tokens would count their experts twice.

Shape suffixes: N rows, S tokens of a row, W tokens of a window.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.storage.rows import TokenRows
from moe_edge.texts.documents import Document, read_documents, render
from moe_edge.texts.recipes import LoadedRecipe, heldout_file

log = logging.getLogger(__name__)
WINDOW = 48  # tokens; longer than a prompt template
REFUSED_SHARE = 0.01  # of the rows; more is no accident of a few rows but the wrong data or template
CUT_CHARACTERS = 1 << 16
OVERLAP_LIMIT = 0.5  # share of a held-out row's windows that may occur in the calibration text


def calibration_rows(
    recipe: LoadedRecipe, tokenizer: PreTrainedTokenizerBase, tokens: int, sequence_length: int, seed: int
) -> TokenRows:
    """`tokens // sequence_length` rows of the recipe's sources in the proportion of their shares.

    Raises:
        ConfigError: a file is missing, or the text does not fill one row.
        InputRejected: unreadable text, or a failing chat template.
    """
    generator = np.random.default_rng(seed)
    streams: dict[int, Iterator[list[int]]] = {}
    refusals: list[Refusals] = []
    for index, source in enumerate(recipe.recipe.sources):
        documents = read_documents(recipe.folder / source.path)
        shuffled = [documents[position] for position in generator.permutation(len(documents))]
        refusals.append(Refusals(str(recipe.folder / source.path)))
        streams[index] = _encoded(shuffled, tokenizer, refusals[-1])
    shares = [source.share for source in recipe.recipe.sources]
    rows = _packed(_mixed(streams, shares), tokens, sequence_length, recipe.name, refusals)
    _warn_if_short(rows, recipe.name)
    return rows


def document_rows(
    documents: Iterable[Document], name: str, tokenizer: PreTrainedTokenizerBase, tokens: int, sequence_length: int
) -> TokenRows:
    """`tokens // sequence_length` rows of documents in their order; no more documents are taken than that needs.

    Raises:
        ConfigError: the text does not fill one row.
        InputRejected: a failing chat template.
    """
    refusals = Refusals(name)
    rows = _packed(_encoded(documents, tokenizer, refusals), tokens, sequence_length, name, [refusals])
    _warn_if_short(rows, name)
    return rows


def heldout_rows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    sequence_length: int,
    calibration: TokenRows | None = None,
) -> TokenRows:
    """Rows of the held-out text (`default`, or a path) in the file's order.

    Args:
        calibration: the rows that the teacher was profiled on; the two must not share text.

    Raises:
        ConfigError: no such file, too little text, or text that also occurs in the calibration set.
        InputRejected: unreadable text, or a failing chat template.
    """
    path = heldout_file(text)
    refusals = Refusals(str(path))
    encoded = _encoded(read_documents(path), tokenizer, refusals)
    rows = _packed(encoded, tokens, sequence_length, path.name, [refusals])
    if calibration is not None:
        refuse_overlap(rows, calibration, path)
    return rows


def refuse_overlap(heldout: TokenRows, calibration: TokenRows, path: Path) -> None:
    """Raise ConfigError when a held-out row, or most of one, is calibration text: the judge would flatter.

    Rows of the same text seldom start at the same token, so windows of 48 tokens are compared at every offset too.
    """
    known_rows = set(calibration.row_digests())
    known_windows = {window for ids_S in calibration.ids_NS for window in _windows(ids_S)}
    for number, (ids_S, digest) in enumerate(zip(heldout.ids_NS, heldout.row_digests(), strict=True)):
        windows = _windows(ids_S)
        shared = sum(window in known_windows for window in windows) / max(len(windows), 1)
        if digest in known_rows or shared > OVERLAP_LIMIT:
            raise ConfigError(
                "the held-out text is part of the calibration text",
                where=f"{path}, row {number}",
                why="quality measured on text that the student was fitted to means nothing",
                next_command="choose another validate.text, or another calibration.recipe",
            )


def _windows(ids_S: np.ndarray) -> list[bytes]:
    if len(ids_S) < WINDOW:
        return []
    windows_NW = np.lib.stride_tricks.sliding_window_view(np.asarray(ids_S, dtype="<i4"), WINDOW)
    return [window.tobytes() for window in windows_NW]


@dataclass
class Refusals:
    """The rows of a text that its chat template refused: skipped and counted, as long as they are few."""

    name: str
    rows: int = 0
    refused: list[InputRejected] = field(default_factory=list)

    def add(self, error: InputRejected, where: str) -> None:
        """Count one. Raises InputRejected when there are more than REFUSED_SHARE of a hundred rows, or of all so far."""
        log.debug("%s is left out: %s", where, error.why)
        self.refused.append(InputRejected(error.what, where=where, why=error.why))
        self._judge(max(self.rows, 100))

    def close(self) -> None:
        """When no more rows come. Raises InputRejected as `add` does, of the rows there were; else warns."""
        if self.refused:
            self._judge(self.rows)
            first = self.refused[0]
            message = "%s: %d of %d rows are left out, the first: %s: %s (%s)"
            log.warning(message, self.name, len(self.refused), self.rows, first.where, first.what, first.why)

    def _judge(self, rows: int) -> None:
        if len(self.refused) > REFUSED_SHARE * rows:
            first = self.refused[0]
            why = f"{first.why}; refused {len(self.refused)} of {self.rows} rows, at most {REFUSED_SHARE:.0%} may be"
            raise InputRejected(first.what, where=first.where, why=why)


def _encoded(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, refusals: Refusals
) -> Iterator[list[int]]:
    """Token ids of each document, a long one in cuts; a plain text gets the tokenizer's special tokens and an end mark, a
    chat has its own."""
    for document in documents:
        refusals.rows += 1
        try:
            text = render(document, tokenizer)
        except InputRejected as error:
            refusals.add(error, document.where)
            continue
        templated = not isinstance(document.content, str) and bool(tokenizer.chat_template)
        yield from _token_ids(text, tokenizer, templated)


def _token_ids(text: str, tokenizer: PreTrainedTokenizerBase, templated: bool) -> Iterator[list[int]]:
    """The ids of a text, at most CUT_CHARACTERS of it at a time: a tokenizer needs a hundred times the memory of its text."""
    end = tokenizer.eos_token_id
    start = 0
    while True:
        stop = _cut(text, start)
        special = not templated and start == 0
        ids = list(tokenizer(text[start:stop], add_special_tokens=special, verbose=False)["input_ids"])
        start, last = stop, stop >= len(text)
        if not last and special and ids[-1:] == [end]:
            ids.pop()
        if last and not templated and end is not None and ids[-1:] != [end]:
            ids.append(end)
        yield ids
        if last:
            return


def _cut(text: str, start: int) -> int:
    """Where the next cut of a text ends: at a space where there is one in its second half."""
    stop = start + CUT_CHARACTERS
    if stop >= len(text):
        return len(text)
    space = text.rfind(" ", start + CUT_CHARACTERS // 2, stop)
    return stop if space < 0 else space


def _mixed(streams: dict[int, Iterator[list[int]]], shares: list[float]) -> Iterator[list[int]]:
    """Documents of all streams; next comes the stream whose tokens lag furthest behind its share."""
    drawn = dict.fromkeys(streams, 0)
    while drawn:
        index = min(drawn, key=lambda stream: drawn[stream] / shares[stream])
        ids = next(streams[index], None)
        if ids is None:
            del drawn[index]
        else:
            drawn[index] += len(ids)
            yield ids


def _packed(
    documents: Iterator[list[int]], asked: int, sequence_length: int, name: str, refusals: Iterable[Refusals]
) -> TokenRows:
    """Rows of the first `asked` tokens; no more documents are taken than those need."""
    wanted = max(asked // sequence_length, 1) * sequence_length
    stream: list[int] = []
    for ids in documents:
        stream += ids
        if len(stream) >= wanted:
            break
    for one in refusals:
        one.close()
    rows = min(len(stream), wanted) // sequence_length
    if rows == 0:
        raise ConfigError(
            f"the text '{name}' has only {len(stream)} tokens, less than one row of {sequence_length}",
            next_command="give more text, or lower calibration.sequence_length",
        )
    flat = np.asarray(stream[: rows * sequence_length], dtype=np.int32)
    return TokenRows(flat.reshape(rows, sequence_length), asked)


def _warn_if_short(rows: TokenRows, name: str) -> None:
    """A warning in the log where there was less text than asked for."""
    if rows.short:
        log.warning("the text '%s' has only %d tokens, %d were asked for", name, rows.n_tokens, rows.asked_tokens)
