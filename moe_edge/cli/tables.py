"""The two command groups that only look things up: `moe-edge targets` and `moe-edge cache`."""

import json
from typing import Annotated

import typer

from moe_edge.contracts.errors import ConfigError, InputRejected

targets = typer.Typer(no_args_is_help=True, help="The devices that can be built for.")
cache = typer.Typer(no_args_is_help=True, help="Profiles shared between builds of the same teacher.")


@targets.command("list")
def targets_list() -> None:
    """Every shipped target with one line."""
    from moe_edge.contracts.targets_io import list_targets, load_target

    for name in list_targets():
        print(f"{name:24} {load_target(name).description}")


@targets.command("show")
def targets_show(name: str, as_json: Annotated[bool, typer.Option("--json", help="Only JSON.")] = False) -> None:
    """Every key of one target: its value, what it means and in which unit, and where it comes from."""
    from moe_edge.contracts.targets_io import describe_target, load_target

    target = load_target(name)
    as_data = target.model_dump(mode="json", by_alias=True)
    print(json.dumps(as_data, indent=1) if as_json else describe_target(target))


@targets.command("check")
def targets_check(path: str) -> None:
    """Check a target file of your own."""
    from moe_edge.contracts.targets_io import load_target

    print(f"{path}: a valid target named '{load_target(path).name}'")


@cache.command("ls")
def cache_ls() -> None:
    """The cached profiles, longest unused first."""
    from moe_edge.contracts.units import format_bytes
    from moe_edge.storage.cache import cache_root, cached_profiles

    print(f"{cache_root()}")
    for home, manifest in cached_profiles():
        size = format_bytes(sum(entry.bytes for entry in manifest.files.values()))
        print(f"  {home.name[:16]}  {size:>10}  teacher {manifest.inputs.get('teacher', '?')[:23]}")


@cache.command("gc")
def cache_gc(keep: Annotated[str, typer.Option("--keep", help="Keep at most this much, e.g. 10GiB.")] = "0") -> None:
    """Delete damaged and unfinished entries, then the longest unused, until at most --keep remain."""
    from moe_edge.contracts.units import parse_bytes
    from moe_edge.storage.cache import collect_garbage

    try:
        gone = collect_garbage(parse_bytes(keep))
    except ValueError as error:
        raise ConfigError(f"--keep: {error}") from error
    for name in gone:
        print(f"  {name[:16]}")
    print(f"deleted {len(gone)} profiles")


@cache.command("verify")
def cache_verify() -> None:
    """Check every cached file against its sha256."""
    from moe_edge.storage.cache import bytes_of, cached_profiles, damaged_profiles

    if bad := damaged_profiles():
        healthy = sum(bytes_of(manifest) for home, manifest in cached_profiles() if home not in bad)
        why = "; ".join(f"{home.name[:16]}: {', '.join(names)}" for home, names in bad.items())
        command = f"moe-edge cache gc --keep {healthy} (deletes the damaged ones and keeps the others)"
        raise InputRejected("cached profiles are damaged", why=why, next_command=command)
    print("every cached profile is intact")
