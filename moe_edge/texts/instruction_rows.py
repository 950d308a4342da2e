"""Instruction sets: rows of a .jsonl file, and the prompt that MiniLLM builds of them.

Fields: `instruction`, `input` (optional), `output` (a text or a list of texts, the references), and optionally `prompt` (used
instead of the template) and `topic` or `category`. Texts that are no texts (null, NaN, numbers) count as empty.
Contract: Gu et al., MiniLLM, 2024 (`tools/process_data_dolly.py`, `evaluate_main.py`).
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.storage.files import refuse_lfs_pointer, sha256_file

PROMPT_TOKENS, TOTAL_TOKENS = 256, 512  # of MiniLLM: a longer prompt keeps its first 256 tokens, an answer has the rest
SEEDS = (10, 20, 30, 40, 50)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
# Tab and newline stay; U+FFFD stands for bytes that are no text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd]")


def clean_text(value: object) -> str:
    """`value` as text that every metric takes: "" for what is no text; no control characters, no halves of surrogate pairs,
    no space around it."""
    if not isinstance(value, str):
        return ""
    return _CONTROL.sub("", value.encode("utf-8", "replace").decode()).strip()


@dataclass(frozen=True)
class InstructionRow:
    """One task; `row_id` is the file's line, `digest` names its prompt."""

    row_id: str
    prompt: str
    references: tuple[str, ...]  # without the empty ones
    category: str | None

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the prompt: what an answer depends on."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()


@dataclass(frozen=True)
class InstructionSet:
    """The rows of one file; `name` is its folder and stem."""

    name: str
    path: Path
    sha256: str
    rows: tuple[InstructionRow, ...]


def read_instruction_sets(paths: Sequence[Path], limit: int | None = None) -> list[InstructionSet]:
    """Every file, at most `limit` rows of each.

    Raises:
        ConfigError: no file is given, one is missing or given twice.
        InputRejected: a line is no JSON object, or has neither instruction nor prompt; or there is no row.
    """
    if not paths:
        raise ConfigError("no instruction set is given", next_command="moe-edge evaluate ARTIFACT --data FILE.jsonl")
    if missing := [path for path in paths if not path.is_file()]:
        raise ConfigError("no such instruction set", where=str(missing[0]))
    names = [f"{path.resolve().parent.name}/{path.stem}" for path in paths]
    if len(set(names)) != len(names):
        names = [str(path) for path in paths]
    if len({path.resolve() for path in paths}) != len(paths):
        raise ConfigError("an instruction set is given twice", why=", ".join(names))
    return [read_instruction_set(path, name, limit) for path, name in zip(paths, names, strict=True)]


def read_instruction_set(path: Path, name: str, limit: int | None = None) -> InstructionSet:
    """One file. Raises InputRejected as `read_instruction_sets` does."""
    refuse_lfs_pointer(path)
    rows: list[InstructionRow] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(rows) >= limit:
                break
            if line.strip():
                rows.append(_row(line, f"{name}:{number}", f"{path}, line {number}"))
    if not rows:
        raise InputRejected("an instruction set holds no row", where=str(path))
    return InstructionSet(name, path, sha256_file(path), tuple(rows))


def _row(line: bytes, row_id: str, where: str) -> InstructionRow:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputRejected("a row is not JSON", where=where, why=str(error)) from error
    if not isinstance(fields, dict):
        raise InputRejected("a row is not a JSON object", where=where, why=type(fields).__name__)
    prompt = _text(fields, "prompt") or build_prompt(_text(fields, "instruction"), _text(fields, "input"))
    if not prompt:
        raise InputRejected(
            "a row has neither instruction nor prompt", where=where, why=f"its fields: {sorted(fields)}"
        )
    output = fields.get("output")
    references = (clean_text(one) for one in (output if isinstance(output, list) else [output]))
    category = _text(fields, "category") or _text(fields, "topic") or None
    return InstructionRow(row_id, prompt, tuple(one for one in references if one), category)


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def build_prompt(instruction: str, extra_input: str = "") -> str:
    """`alpaca_prompt`; "" without an instruction."""
    return alpaca_prompt(instruction, extra_input) if instruction.strip() else ""


def alpaca_prompt(instruction: str, extra_input: str = "") -> str:
    """The Alpaca template, with its Input block only where there is one (Taori et al., Stanford Alpaca, 2023)."""
    # replace, not format: an instruction may hold braces
    template = WITH_INPUT.replace("{input}", extra_input) if extra_input else WITHOUT_INPUT
    return template.replace("{instruction}", instruction, 1)
