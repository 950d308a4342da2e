"""Rows and files as documents: plain text, or a chat whose whole messages reach the template.

A row is, by its columns (one that is null counts as absent): a chat (`messages`, or ShareGPT's `conversations`, with `tools`), an
instruction (`instruction`, `input` or `context`, `output` or `response`), a pair (`prompt` with `completion`, `response` or
`output`; texts, or lists of messages), or plain `text`. Rows stand one a line (.jsonl, .ndjson), or in one JSON array (.json);
any other file is UTF-8 text, cut at blank lines into pieces that can be shuffled.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.models.chat_template import render_chat
from moe_edge.texts.instruction_rows import alpaca_prompt

PIECE_CHARACTERS = 2000  # plain text is shuffled in pieces of at least this length
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json")
COLUMNS = "messages or conversations, or instruction and output, or prompt and completion, or text"
ANSWERS = ("output", "response", "completion")
# ShareGPT's names of who speaks -> the roles that templates know
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant"}
ROLES |= {"model": "assistant", "function_call": "assistant", "function_response": "tool", "observation": "tool"}

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Document:
    """Plain text, or the messages of a chat with the tools that it may call; `where` names its file and row."""

    content: str | Messages
    tools: list[Any] | None = None
    where: str = "calibration text"


def read_documents(path: Path) -> list[Document]:
    """The documents of a file in their order, at least one; rows without text are left out.

    Raises:
        ConfigError: no such file.
        InputRejected: not UTF-8, a broken row (named by its line), or no text at all.
    """
    if not path.is_file():
        raise ConfigError("no such text file", where=str(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputRejected("the text is not UTF-8", where=str(path), why=str(error)) from error
    if path.suffix.lower() in ROW_SUFFIXES:
        documents = [document_of(row, where) for row, where in _rows(path, text)]
    else:
        documents = [Document(piece, where=str(path)) for piece in _pieces(text)]
    documents = [document for document in documents if document.content]
    if not documents:
        raise InputRejected("the file holds no text", where=str(path))
    return documents


def _rows(path: Path, text: str) -> Iterator[tuple[Any, str]]:
    """(row, where it stands) of a JSON array, of one JSON object, or of lines."""
    opening = text.lstrip()[:1]
    first_line = text.lstrip().partition("\n")[0].rstrip()
    if opening == "[" or (path.suffix.lower() == ".json" and not first_line.endswith("}")):
        whole = _parsed(text, str(path))
        for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
            yield row, f"{path}, row {number}"
        return
    for number, line in enumerate(text.split("\n"), 1):
        bare = line.strip().lstrip("\ufeff")  # files joined by `cat` keep the mark of each
        if bare:
            yield _parsed(bare, f"{path}, line {number}"), f"{path}, line {number}"


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(where, f"not JSON: {error}") from error


def _unreadable(where: str, why: str) -> InputRejected:
    return InputRejected("a row cannot be read", where=where, why=f"{why}; a row has {COLUMNS}")


def document_of(row: Any, where: str) -> Document:
    """A row as a document. Raises InputRejected, which names `where`, when it has none of the known columns."""
    try:
        return _document(row, where)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        columns = f"columns {', '.join(map(str, row))}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise _unreadable(where, f"{columns}: {error}") from error


def _document(row: dict[str, Any], where: str) -> Document:
    given = {name: value for name, value in row.items() if value is not None}
    for name in ("messages", "conversations"):
        if name in given:
            system = [{"role": "system", "content": given["system"]}] if given.get("system") else []
            return Document(system + _turns(given[name]), _tools(given), where)
    if "instruction" in given:
        context = given.get("input") or given.get("context")
        question = given["instruction"] + (f"\n\n{context}" if context else "")
        asked, answer = {"role": "user", "content": question}, {"role": "assistant", "content": _answer(row, given)}
        return Document([asked, answer], where=where)
    if "prompt" in given:
        prompt, answer = given["prompt"], _answer(row, given)
        if isinstance(prompt, str) and isinstance(answer, str):
            return Document(prompt + answer, where=where)
        return Document(_side("user", prompt) + _side("assistant", answer), _tools(given), where)
    if not isinstance(given["text"], str):
        raise TypeError("text is not a string")
    return Document(given["text"], where=where)


def _answer(row: dict[str, Any], given: dict[str, Any]) -> Any:
    """The first answer column that holds something; a null one is for `render` to judge."""
    held = [name for name in ANSWERS if name in given] or [name for name in ANSWERS if name in row]
    if not held:
        raise KeyError(f"none of {', '.join(ANSWERS)}")
    return row[held[0]]


def _side(role: str, told: Any) -> Messages:
    """One side of a pair, a text or messages."""
    return [{"role": role, "content": told}] if isinstance(told, str) else _turns(told)


def _turns(turns: Any) -> Messages:
    """Messages with every entry that they came with; ShareGPT's `from` and `value` become role and content."""
    if not isinstance(turns, list):
        raise TypeError(f"a chat is a list of messages, not {type(turns).__name__}")
    return [_turn(turn) for turn in turns]


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in turn.items() if name not in ("from", "value")}
    if "role" not in kept:
        kept["role"] = ROLES.get(turn["from"], turn["from"])
    if "content" not in kept and "value" in turn:
        kept["content"] = turn["value"]
    if not isinstance(kept["role"], str) or len(kept) < 2:
        raise TypeError("a message has a role, and content or what stands for it")
    return kept


def _tools(row: dict[str, Any]) -> list[Any] | None:
    """The tools of a row, which many data sets keep as JSON in a string."""
    tools = row.get("tools") or None
    if isinstance(tools, str):
        tools = json.loads(tools) if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise TypeError(f"tools are a list, not {type(tools).__name__}")
    return tools or None


def _pieces(text: str) -> list[str]:
    """Paragraphs joined until a piece has PIECE_CHARACTERS, so that shuffling keeps context."""
    pieces: list[list[str]] = [[]]
    length = 0
    for paragraph in text.split("\n\n"):
        if length >= PIECE_CHARACTERS:
            pieces.append([])
            length = 0
        if paragraph.strip():
            pieces[-1].append(paragraph.strip("\n"))
            length += len(pieces[-1][-1])
    return ["\n\n".join(piece) for piece in pieces if piece]


def render(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    """A document as text: a chat through the tokenizer's template, or as an Alpaca prompt when it has none.

    Raises:
        InputRejected: a chat that is not text, where there is no template; or the template fails: it runs in a sandbox with
            limits, so a hostile one ends here too.
    """
    if isinstance(document.content, str):
        text = document.content
    elif not tokenizer.chat_template:
        text = _alpaca(document.content, document.where)
    else:
        text = _templated(document.content, document.tools, tokenizer)
    return text.encode("utf-8", "replace").decode()  # JSON may hold halves of surrogate pairs, which no tokenizer takes


def _templated(messages: Messages, tools: list[Any] | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Through the template; one that joins every turn's content to a text gets "" where a turn has none."""
    try:
        return render_chat(tokenizer, messages, tools=tools)
    except InputRejected:
        filled = [turn if turn.get("content") is not None else turn | {"content": ""} for turn in messages]
        if filled == messages:
            raise
    return render_chat(tokenizer, filled, tools=tools)


def _alpaca(messages: Messages, where: str) -> str:
    """The first question and its answer; further turns follow as paragraphs."""
    for turn in messages:
        if not isinstance(turn.get("content"), str):
            kind = type(turn.get("content")).__name__
            why = f"the turn of {turn['role']!r} is {kind}, and the tokenizer has no chat template"
            raise InputRejected("a chat holds what is not text", where=where, why=why)
    asked = [turn["content"] for turn in messages if turn["role"] != "assistant"]
    answered = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    instruction, _, context = "\n\n".join(asked).partition("\n\n")
    return alpaca_prompt(instruction, context) + "\n\n".join(answered)
