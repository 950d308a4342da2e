"""Calibration recipes and the documents they name: which text the teacher reads, from where, under which licence.

A recipe is a YAML file beside its text files. A path to a .jsonl file or to any other text stands for a recipe with
that one source. A `.jsonl` row is a chat (`messages`), an instruction (`instruction`, `input`, `output`) or plain
`text`; everything else is UTF-8 text, cut at blank lines into pieces that can be shuffled.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedTokenizerBase

from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.config_io import read_yaml, validate_document
from moe_edge.contracts.data import data_root
from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.contracts.manifest import MANIFEST_NAME
from moe_edge.models.chat_template import render_chat
from moe_edge.storage.files import sha256_file
from moe_edge.texts.instruction_rows import alpaca_prompt

DEFAULT = "default"
PIECE_CHARACTERS = 2000  # plain text is shuffled in pieces of at least this length
_CLOSED = ConfigDict(extra="forbid", frozen=True)

Messages = list[dict[str, Any]]
Document = str | Messages  # plain text, or a chat


class Credit(BaseModel):
    """A text file with where it comes from."""

    model_config = _CLOSED
    path: str = Field(description="file, relative to the recipe")
    source: str = Field(description="title, author and address of the text")
    licence: str = Field(description="SPDX identifier")


class Source(Credit):
    """A text file that calibration rows are made of."""

    share: float = Field(1.0, gt=0, description="part of the tokens, relative to the other sources' shares")


class Recipe(BaseModel):
    """Text sources and how much of each."""

    model_config = _CLOSED
    schema_: Literal["moe-edge/recipe@1"] = Field("moe-edge/recipe@1", alias="schema")
    description: str = ""
    sources: list[Source] = Field(min_length=1)
    heldout: Credit | None = Field(None, description="text that is never calibrated on, the default judge of artifacts")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and the folder to which its paths are relative."""

    name: str
    recipe: Recipe
    folder: Path

    def files(self) -> list[Path]:
        """Every file that the recipe names, for keys and digests."""
        credits: list[Credit] = list(self.recipe.sources)
        credits += [self.recipe.heldout] if self.recipe.heldout else []
        return [self.folder / credit.path for credit in credits]


def load_recipe(name_or_path: str) -> LoadedRecipe:
    """A shipped recipe by name, a .yaml recipe by path, or any text file as a recipe of one source.

    Raises:
        ConfigError: no such recipe or file, or a wrong key with its line.
    """
    shipped = data_root("calibration")
    path = Path(name_or_path).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        if path.is_file():
            source = Source(path=path.name, source=str(path.name), licence="unknown")
            return LoadedRecipe(path.name, Recipe(sources=[source]), path.parent)
        path = shipped / f"{name_or_path}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(found.stem for found in shipped.glob("*.yaml")))
            raise ConfigError(
                f"no calibration recipe or file '{name_or_path}'",
                where="calibration.recipe",
                why=f"shipped recipes: {known}; or give the path of a .yaml recipe, a .jsonl or a text file",
            )
    return LoadedRecipe(path.stem, validate_document(Recipe, read_yaml(path)), path.parent)


def heldout_file(text: str) -> Path:
    """The held-out text: `default` is the default recipe's split, everything else a path.

    Raises:
        ConfigError: no such file.
    """
    if text != DEFAULT:
        return Path(text).expanduser()
    loaded = load_recipe(DEFAULT)
    if loaded.recipe.heldout is None:
        raise ConfigError("the default recipe has no held-out text", where=str(loaded.folder))
    return loaded.folder / loaded.recipe.heldout.path


def read_documents(path: Path) -> list[Document]:
    """The documents of a file in their order, at least one.

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
    documents = _rows(path, text) if path.suffix == ".jsonl" else _pieces(text)
    if not documents:
        raise InputRejected("the file holds no text", where=str(path))
    return documents


def _rows(path: Path, text: str) -> list[Document]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                documents.append(document_of(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                why = f"{type(error).__name__}: {error}; a row has messages, or instruction and output, or text"
                raise InputRejected("a row cannot be read", where=f"{path}, line {number}", why=why) from error
    return documents


def document_of(row: dict[str, Any]) -> Document:
    """A row as a document. Raises KeyError or TypeError when it has none of the known columns."""
    if "messages" in row:
        return [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
    if "instruction" in row:
        context = f"\n\n{row['input']}" if row.get("input") else ""
        answer = {"role": "assistant", "content": row["output"]}
        return [{"role": "user", "content": row["instruction"] + context}, answer]
    if not isinstance(row["text"], str):
        raise TypeError("text is not a string")
    return row["text"]


def _pieces(text: str) -> list[Document]:
    """Paragraphs joined until a piece has PIECE_CHARACTERS, so that shuffling keeps context."""
    pieces: list[list[str]] = [[]]
    for paragraph in text.split("\n\n"):
        if sum(map(len, pieces[-1])) >= PIECE_CHARACTERS:
            pieces.append([])
        if paragraph.strip():
            pieces[-1].append(paragraph.strip("\n"))
    return ["\n\n".join(piece) for piece in pieces if piece]


def render(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    """A document as text: a chat through the tokenizer's template, or as an Alpaca prompt when it has none.

    Raises:
        InputRejected: a chat that is not text, where there is no template; or the template fails: it runs in a sandbox with
            limits, so a hostile one ends here too.
    """
    if isinstance(document, str):
        return document
    if not tokenizer.chat_template:
        return _alpaca(document)
    return render_chat(tokenizer, document)


def _alpaca(messages: Messages) -> str:
    """The first question and its answer; further turns follow as paragraphs."""
    for turn in messages:
        if not isinstance(turn["content"], str):
            why = f"the turn of {turn['role']!r} is {type(turn['content']).__name__}, and the tokenizer has no chat template"
            raise InputRejected("a chat holds what is not text", where="calibration text: messages, output", why=why)
    asked = [turn["content"] for turn in messages if turn["role"] != "assistant"]
    answered = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    instruction, _, context = "\n\n".join(asked).partition("\n\n")
    return alpaca_prompt(instruction, context) + "\n\n".join(answered)


def named_files(config: BuildConfig) -> dict[str, dict[str, str]]:
    """Per stage the digests of the texts that its settings name, so that editing one is noticed."""
    recipe = load_recipe(config.calibration.recipe)
    calibration = {source.path: sha256_file(recipe.folder / source.path) for source in recipe.recipe.sources}
    heldout = heldout_file(config.validate_.text)
    if not heldout.is_file():
        raise ConfigError("no such text file", where=f"validate.text: {heldout}")
    earlier = Path(config.plan.within) if config.plan.within else None
    return {
        "profile": calibration,
        "plan": {earlier.name: sha256_file(earlier)} if earlier else {},
        "distill": data_digests(config.distill.data),
        "validate": {heldout.name: sha256_file(heldout)},
    }


def data_digests(data: str) -> dict[str, str]:
    """Of the files that `distill.data` names: a text, a recipe and its texts, or the manifest of a capture."""
    path = Path(data).expanduser()
    if path.is_file():
        return {str(file): sha256_file(file) for file in (path, *load_recipe(data).files())}
    manifest = path / MANIFEST_NAME
    return {"capture": sha256_file(manifest)} if manifest.is_file() else {}
