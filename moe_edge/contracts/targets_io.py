"""Finding, listing and reading target files: shipped ones by name, a user's own by path.

A target is data (targets/*.yaml); an unknown name is answered with the nearest known one and the whole list, a wrong
key with its file and line.
"""

from pathlib import Path

from moe_edge.contracts.config_io import Document, did_you_mean, read_yaml, validate_document
from moe_edge.contracts.data import data_root
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.target import Target

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
