"""manifest.json: what a folder holds, from what it was made, and whether it may be reused.

`key` says what would be computed (schema, stage configuration, input digests, versions) and is known beforehand; `digest` says
what was computed (the files) and is what the next stage pins. Neither contains a time, a host or a path.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

MANIFEST_SCHEMA = "moe-edge/manifest@1"
MANIFEST_NAME = "manifest.json"


def installed_version(package: str) -> str:
    """The installed version of a package, or 'not installed'."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


class FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: str
    bytes: int


class Cost(BaseModel):
    """What the stage cost when it ran."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seconds: float
    peak_rss_mib: float | None


class Manifest(BaseModel):
    """One stage's folder, or with stage 'run' the delivered files of a build."""

    model_config = ConfigDict(extra="forbid")
    schema_: str = Field(MANIFEST_SCHEMA, alias="schema")
    stage: str
    key: str
    digest: str
    inputs: dict[str, str] = {}
    config: dict[str, Any] = {}
    versions: dict[str, str] = {}
    files: dict[str, FileEntry] = {}
    summary: dict[str, Any] = {}
    cost: Cost | None = None
    edited: bool = Field(False, description="a user changed the files by hand and built on with --from")

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest; None where there is none or it cannot be read (then the folder counts as unfinished)."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return None


def canonical_sha256(value: Any) -> str:
    """sha256 of the canonical JSON of plain data."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def stage_key(
    stage: str, schema: int, config: Mapping[str, Any], inputs: Mapping[str, str], versions: Mapping[str, str]
) -> str:
    """The key of a stage: equal keys mean that the same thing would be computed."""
    return canonical_sha256(
        {"stage": stage, "schema": schema, "config": config, "inputs": dict(inputs), "versions": dict(versions)}
    )


def content_digest(files: Mapping[str, FileEntry]) -> str:
    """The digest of a folder's content: names and hashes, nothing else."""
    return canonical_sha256({name: entry.sha256 for name, entry in files.items()})
