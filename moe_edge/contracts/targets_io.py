"""Finding, listing, reading and showing target files: shipped ones by name, a user's own by path.

A target is data (targets/*.yaml); an unknown name is answered with the nearest known one and the whole list, a wrong
key with its file and line.
"""

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from moe_edge.contracts.config_io import Document, did_you_mean, read_yaml, validate_document
from moe_edge.contracts.data import data_root
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.target import Fact, Target

SUFFIXES = (".yaml", ".yml")


def list_targets() -> list[str]:
    """Names of the shipped targets, sorted."""
    return sorted(path.stem for path in data_root("targets").glob("*.yaml"))


def find_target(name_or_path: str) -> Path:
    """The file of a shipped target, or the user's own file when a path to a .yaml is given.

    Raises:
        ConfigError: no shipped target has that name, or no file lies at that path.
    """
    if name_or_path.endswith(SUFFIXES):
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise ConfigError(f"no such target file: {name_or_path}", next_command="moe-edge targets list")
        return path
    known = list_targets()
    if name_or_path not in known:
        raise ConfigError(
            f"unknown target '{name_or_path}'{did_you_mean(name_or_path, known)}",
            why=f"shipped targets: {', '.join(known)}; or give the path of a .yaml file",
            next_command="moe-edge targets list",
        )
    return data_root("targets") / f"{name_or_path}.yaml"


def read_target(name_or_path: str) -> Document:
    """The target's plain data with line numbers, to be merged with the config file and flags.

    Raises:
        ConfigError: not found or not YAML.
    """
    return read_yaml(find_target(name_or_path))


def load_target(name_or_path: str) -> Target:
    """The validated target.

    Raises:
        ConfigError: not found, not YAML, or a wrong key or value with its line.
    """
    target: Target = validate_document(Target, read_target(name_or_path))
    return target


def describe_target(target: Target) -> str:
    """Every key of a target as aligned text: dotted name, value, what it means with its unit, where it comes from."""
    rows = list(_rows(target))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {text}".rstrip() for key, value, text in rows)


def _rows(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for name, field in type(model).model_fields.items():
        value, key = getattr(model, name), prefix + (field.alias or name)
        if isinstance(value, Fact):
            yield key, _shown(value.value), f"{field.description} [{value.confidence}: {value.source}]"
        elif isinstance(value, BaseModel):
            yield from _rows(value, key + ".")
        else:
            yield key, _shown(value), field.description or ""


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.12g}"
    return "-" if value is None else str(value)
