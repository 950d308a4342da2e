"""From YAML, `--set` and flags to a validated BuildConfig, with errors that name the line and the nearest known key.

Layers are merged as plain data in the order defaults < target file < config file < `--set` < flags, then validated once, so
that a relative budget in a target and an absolute one in a config file are judged together.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

from moe_edge.contracts.config import KEYWORD, LISTED, BuildConfig
from moe_edge.contracts.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20  # a config is a page; more is a mistake or an attack
MAX_DEPTH = 32
MAX_NODES = 10_000
MAX_COMPLAINTS = 20
Path_ = tuple[str | int, ...]


@dataclass
class Document:
    """Plain data from one YAML file, and the line on which each key stands (1-based)."""

    data: dict[str, Any]
    source: str
    lines: dict[Path_, int] = field(default_factory=dict)


def read_yaml(path: Path) -> Document:
    """Read a YAML mapping.

    Raises:
        ConfigError: no such file, not UTF-8 YAML, duplicate keys, aliases, too large or deep, or no mapping at the top.
    """
    if not path.is_file():
        raise ConfigError(f"no such file: {path}", next_command="moe-edge targets list, or check --config")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError("the configuration is larger than 1 MiB", where=str(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
        _refuse_what_expands(text)
        node = YAML(typ="rt").load(text)
    except (YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError("not valid YAML", where=str(path), why=_one_line(error)) from error
    if node is None:
        node = CommentedMap()
    if not isinstance(node, CommentedMap):
        raise ConfigError("expected a mapping of keys at the top", where=str(path))
    document = Document({}, str(path))
    document.data = _plain(node, (), document.lines)
    return document


def _refuse_what_expands(text: str) -> None:
    """Look at the text's structure before anything is built of it: it may be small and stand for gigabytes.

    Raises:
        ValueError: aliases or merge keys, deeper than 32 levels, or more than 10,000 nodes.
        YAMLError: it is no YAML.
    """
    depth = 0
    for count, event in enumerate(YAML(typ="safe", pure=True).parse(text)):
        if isinstance(event, AliasEvent):
            raise ValueError(f"line {event.start_mark.line + 1}: aliases (*name) are not read; write the value out")
        if isinstance(event, ScalarEvent) and event.value == "<<" and event.style is None:
            raise ValueError(f"line {event.start_mark.line + 1}: merge keys (<<) are not read; write the keys out")
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH or count > MAX_NODES:
            raise ValueError(f"more than {MAX_DEPTH} levels of nesting or {MAX_NODES} nodes")


def _refuse_odd_values(value: Any, path: Path_, target: Document | None, file: Document | None) -> None:
    """Raises ConfigError on a NUL in any text and on a number that is not finite: no setting can mean them."""
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{_dotted(path)}: a NUL character in a text{_where(path, target, file)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{_dotted(path)}: {value} is not a finite number{_where(path, target, file)}")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_odd_values(key, (*path, str(key)), target, file)
            _refuse_odd_values(inner, (*path, key), target, file)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _refuse_odd_values(inner, (*path, index), target, file)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _plain(node: Any, path: Path_, lines: dict[Path_, int]) -> Any:
    """ruamel's nodes as plain dicts, lists and scalars; fills `lines`."""
    if isinstance(node, CommentedMap):
        for key in node:
            lines[*path, key] = node.lc.key(key)[0] + 1
        return {key: _plain(value, (*path, key), lines) for key, value in node.items()}
    if isinstance(node, CommentedSeq):
        return [_plain(value, (*path, index), lines) for index, value in enumerate(node)]
    for kind in (bool, int, float, str):  # ruamel's scalars are subclasses
        if isinstance(node, kind):
            return node if kind is bool else kind(node)
    return node


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; mappings merge key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_setting(text: str) -> dict[str, Any]:
    """'plan.experts=62.5%' -> {'plan': {'experts': '62.5%'}}; the value is read as YAML.

    Raises:
        ConfigError: no '=' or an empty key.
    """
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys) or len(keys) > MAX_DEPTH:
        raise ConfigError(f"--set expects key.subkey=value, got '{text[:100]}'", next_command="moe-edge build --help")
    try:
        _refuse_what_expands(value)
        parsed = YAML(typ="safe").load(value)
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"--set {path}: not a YAML value", why=_one_line(error)) from error
    return nested(keys, parsed)


def nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    """["plan", "experts"], 10 -> {"plan": {"experts": 10}}."""
    setting: dict[str, Any] = {keys[-1]: value}
    for key in reversed(keys[:-1]):
        setting = {key: setting}
    return setting


def value_at(data: Mapping[str, Any], dotted: str) -> Any:
    """The value under a dotted key, which is there."""
    value: Any = data
    for key in dotted.split("."):
        value = value[key]
    return value


def resolve_config(
    target: Document,
    file: Document | None = None,
    settings: Sequence[str] | None = None,
    flags: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> BuildConfig:
    """Merge the layers and validate.

    Args:
        settings: texts of `--set`.
        overrides: the same as values: dotted key -> value.

    Raises:
        ConfigError: listing every wrong key with its file, line and the nearest known name.
    """
    data: dict[str, Any] = {"target": target.data}
    if file is not None:
        data = merge(data, file.data)
    for setting in settings or []:
        data = merge(data, parse_setting(setting))
    for dotted, value in (overrides or {}).items():
        data = merge(data, nested(dotted.split("."), value))
    data = merge(data, flags or {})
    data.setdefault("schema", "moe-edge/config@1")
    _refuse_odd_values(data, (), target, file)
    try:
        return BuildConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(*_explain(error, BuildConfig, target, file)) from error


def validate_document(model: type[BaseModel], document: Document) -> Any:
    """One document as `model`, for files that stand alone (targets, recipes).

    Raises:
        ConfigError: as resolve_config.
    """
    _refuse_odd_values(document.data, (), None, document)
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        raise ConfigError(*_explain(error, model, None, document)) from error


def _explain(
    error: ValidationError, model: type[BaseModel], target: Document | None, file: Document | None
) -> tuple[str]:
    problems, messages = error.errors(), []
    for problem in problems[:MAX_COMPLAINTS]:
        path: Path_ = tuple(part for part in problem["loc"] if part not in (LISTED, KEYWORD))
        where = _where(path, target, file)
        if problem["type"] == "extra_forbidden":
            messages.append(f"unknown key '{_dotted(path)}'{_did_you_mean(path, model)}{where}")
        else:
            messages.append(f"{_dotted(path)}: {problem['msg'].removeprefix('Value error, ')}{where}")
    if len(problems) > MAX_COMPLAINTS:
        messages.append(f"and {len(problems) - MAX_COMPLAINTS} more")
    return ("the configuration is not valid:\n  " + "\n  ".join(messages),)


def _dotted(path: Path_) -> str:
    return ".".join(str(part) for part in path)[:200].replace("\0", "\\0")


def _where(path: Path_, target: Document | None, file: Document | None) -> str:
    """' (build.yaml, line 3)': the deepest known line at or above `path`."""
    candidates = [(file, path)] if file else []
    if target is not None and path[:1] == ("target",):
        candidates.append((target, path[1:]))
    for document, inner in candidates:
        for length in range(len(inner), 0, -1):
            if inner[:length] in document.lines:
                return f" ({document.source}, line {document.lines[inner[:length]]})"
    return ""


def did_you_mean(word: str, known: list[str]) -> str:
    """'; did you mean X?' for the nearest known word, else nothing."""
    close = difflib.get_close_matches(word[:100], known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def _did_you_mean(path: Path_, model: type[BaseModel]) -> str:
    known = _known_keys(path[:-1], model)
    listed = f"; known here: {', '.join(known)}" if known else ""
    return did_you_mean(str(path[-1]), known) or listed


def _known_keys(parents: Path_, model: type[BaseModel]) -> list[str]:
    """The keys that the model at `parents` accepts."""
    schema = _schema(model)
    definitions, node = schema.get("$defs", {}), schema
    for part in parents:
        node = _resolve(node, definitions)
        node = _items(node) if isinstance(part, int) else node.get("properties", {}).get(part, {})
    return sorted(_resolve(node, definitions).get("properties", {}))


@cache
def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema(by_alias=True)


def _items(node: dict[str, Any]) -> dict[str, Any]:
    """The items of a list, also where a keyword may stand in its place."""
    options = (node, *node.get("oneOf", []))
    return next((option["items"] for option in options if "items" in option), {})


def _resolve(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Follow $ref, and the only object among alternatives."""
    for option in (node, *node.get("anyOf", []), *node.get("allOf", [])):
        if "$ref" in option:
            return definitions[option["$ref"].rsplit("/", 1)[1]]  # type: ignore[no-any-return]
    return node
