"""Folders as values: hash every file of one, tell which files changed, copy one by hard links where the disk allows it.

So is what leaves a build: the artifacts folder that a user ships (`deliver`), and the manifest over every delivered file.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_edge.contracts.manifest import MANIFEST_NAME, FileEntry, Manifest, canonical_sha256, content_digest
from moe_edge.storage.files import sha256_file, write_text_atomic

EVENTS = "events.out.tfevents."  # what TensorBoard writes: its names and its content hold the time and the process
BESIDE_ARTIFACTS = ("report.json", "report.md", "config.yaml")
BUNDLES = "bundle"  # in artifacts/: the device bundles, assembled from what is delivered here
LINK_FROM_BYTES = 1 << 20  # smaller files are copied, so that editing one never edits its twin


def files_of(folder: Path) -> list[Path]:
    """Every delivered file below `folder`, sorted by name; dot-files, logs for TensorBoard and the folder's own manifest are
    not among them, so that a digest depends on no clock."""
    found = (path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_NAME)
    found = (path for path in found if not path.name.startswith(EVENTS))
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def hash_file(path: Path) -> FileEntry:
    """Hash and size of one file."""
    return FileEntry(sha256=sha256_file(path), bytes=path.stat().st_size)


def hash_folder(folder: Path) -> dict[str, FileEntry]:
    """{relative name: hash and size} of every file below `folder`."""
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files_of(folder)}


def changed_files(folder: Path, files: Mapping[str, FileEntry]) -> list[str]:
    """Names that are missing, have another size, or another hash than recorded."""
    changed = []
    for name, entry in files.items():
        path = folder / name
        same = path.is_file() and path.stat().st_size == entry.bytes and sha256_file(path) == entry.sha256
        if not same:
            changed.append(name)
    return changed


def link_or_copy(source: Path, destination: Path) -> None:
    """A hard link for large files on the same disk, else a copy with the same modification time.

    Raises:
        FileExistsError: `destination` is there; it may be a link to someone's file, which a copy would write into.
    """
    if destination.exists():
        raise FileExistsError(f"{destination} is there already")
    destination.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_size >= LINK_FROM_BYTES:
        try:
            os.link(source, destination)
            return
        except FileExistsError:
            raise
        except OSError:
            pass  # another disk, or one without hard links
    shutil.copy2(source, destination)


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A fresh folder to write into; it replaces `folder` when the block ends well, so a kill leaves no half of it."""
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def mirror(source: Path, destination: Path) -> None:
    """Make `destination` a twin of the folder `source`, complete or not at all; an earlier destination is replaced."""
    with written_beside(destination) as beside:
        for path in files_of(source):
            link_or_copy(path, beside / path.relative_to(source))
        if (source / MANIFEST_NAME).exists():
            link_or_copy(source / MANIFEST_NAME, beside / MANIFEST_NAME)


def bytes_below(folder: Path) -> int:
    """Size of all files below a folder, half-written ones too; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def free_disk_bytes(folder: Path) -> int:
    """What is free where a folder lies."""
    return shutil.disk_usage(folder).free


def links_are_possible(folder: Path) -> bool:
    """Can the disk of an existing folder give a file a second name? Tried, because no system call tells."""
    source, twin = folder / ".link-probe", folder / ".link-probe-twin"
    try:
        source.touch()
        os.link(source, twin)
        return True
    except OSError:
        return False
    finally:
        source.unlink(missing_ok=True)
        twin.unlink(missing_ok=True)


def deliver(out: Path, student: Path, export: Path) -> None:
    """Assemble `out/artifacts` from the student and the exported files, unless it already holds exactly them.

    Device bundles of an earlier build stay until they are written anew.
    """
    parts = {"hf": student, "gguf": export / "gguf", "onnx": export / "onnx"}
    artifacts = out / "artifacts"
    wanted = {name: hash_folder(source) for name, source in parts.items() if source.is_dir()}
    stale = [path for path in artifacts.glob("*") if path.name not in wanted and path.name != BUNDLES]
    for name, files in wanted.items():
        target = artifacts / name
        if not target.is_dir() or changed_files(target, files) or hash_folder(target).keys() != files.keys():
            artifacts.mkdir(parents=True, exist_ok=True)
            mirror(parts[name], target)
    for path in stale:
        shutil.rmtree(path)


def write_run_manifest(out: Path, config: dict[str, Any], inputs: dict[str, str], versions: dict[str, str]) -> Manifest:
    """out/manifest.json over every delivered file, written last."""
    delivered = {f"artifacts/{name}": entry for name, entry in hash_folder(out / "artifacts").items()}
    delivered |= {name: hash_file(out / name) for name in BESIDE_ARTIFACTS if (out / name).is_file()}
    key = canonical_sha256({"config": config, "inputs": inputs, "versions": versions})
    manifest = Manifest(
        stage="run",
        key=key,
        digest=content_digest(delivered),
        inputs=inputs,
        config=config,
        versions=versions,
        files=delivered,
    )
    write_text_atomic(out / "manifest.json", manifest.to_json())
    return manifest
