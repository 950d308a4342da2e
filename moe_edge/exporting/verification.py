"""Is a delivered folder what its manifest says? Every sha256, nothing missing, nothing extra, headers well-formed.

The folder may come from anywhere: names in the manifest that leave it, symbolic links and crafted headers are faults, and
nothing of it is run. A bundle's .tar is unpacked beside itself for the check, regular files only.
"""

import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import get_args

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.contracts.manifest import MANIFEST_NAME, FileEntry, Manifest, read_manifest
from moe_edge.contracts.onnx_bits import Provider
from moe_edge.runtimes.gguf_header import check_gguf_header
from moe_edge.runtimes.onnx_header import GRAPH, inspect_onnx
from moe_edge.storage.files import sha256_file
from moe_edge.storage.safetensors_header import read_header

MANIFEST_LIMIT_BYTES = 64 << 20
MEMBER_LIMIT = 10_000
ACCELERATORS = tuple(name for name in get_args(Provider) if name != "cpu")  # that we write folders for
DELIVERED = "artifacts"  # of a build's folder; beside it lie the stages, which have their own manifests


def faults(path: Path) -> list[str]:
    """What is wrong with a build's folder, a bundle's folder or a bundle's tar: "name: why" each, [] = sound.

    Raises:
        ConfigError: no manifest is there to verify against.
        InputRejected: the tar is damaged or holds what a bundle cannot.
    """
    if path.is_file() and tarfile.is_tarfile(path):
        with _unpacked(path) as folder:
            return faults(folder)
    if path.is_file() and (fault := _bad_header(path, path.name)):
        return [fault]  # a model file has no manifest, but what it claims can be checked
    manifest = _manifest(path)
    found = [fault for name, entry in sorted(manifest.files.items()) if (fault := _fault(path, name, entry))]
    return found + [f"{name}: not in the manifest" for name in _extra(path, manifest)]


def _manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_NAME
    if path.is_file() and path.stat().st_size > MANIFEST_LIMIT_BYTES:
        raise InputRejected("the manifest is too large", where=str(path))
    manifest = read_manifest(folder)
    if manifest is None:
        raise ConfigError(
            "no manifest.json to verify against",
            where=str(folder),
            next_command="moe-edge build ..., or give a bundle's folder or .tar",
        )
    return manifest


def _fault(folder: Path, name: str, entry: FileEntry) -> str | None:
    """Why one listed file is not what it should be."""
    pure, path = PurePosixPath(name), folder / name
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        return f"{name}: the name leaves the folder"
    if any((folder / part).is_symlink() for part in (pure, *pure.parents)):
        return f"{name}: is a symbolic link"
    if not path.is_file():
        return f"{name}: missing"
    if path.stat().st_size != entry.bytes:
        return f"{name}: has {path.stat().st_size} bytes, expected {entry.bytes}"
    if sha256_file(path) != entry.sha256:
        return f"{name}: changed"
    return _bad_header(path, name)


def _bad_header(path: Path, name: str) -> str | None:
    """A crafted file can have the right sha256, if its maker wrote the manifest."""
    try:
        if path.suffix == ".gguf":
            check_gguf_header(path)
        elif path.name == GRAPH:
            inspect_onnx(path.parent, ACCELERATORS)
        elif path.suffix == ".safetensors":
            read_header(path)
    except InputRejected as error:
        return f"{name}: {error.what}" + (f" ({error.why})" if error.why else "")
    return None


def _extra(folder: Path, manifest: Manifest) -> list[str]:
    """Files that the manifest does not list; in a build's folder, among the delivered ones."""
    top = folder / DELIVERED if manifest.stage == "run" else folder
    present = {path.relative_to(folder).as_posix() for path in top.rglob("*") if path.is_symlink() or not path.is_dir()}
    return sorted(present - manifest.files.keys() - {MANIFEST_NAME})


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """The single folder of a bundle's tar, unpacked into a scratch folder on the same disk."""
    with tempfile.TemporaryDirectory(prefix=".moe-edge-verify-", dir=path.resolve().parent) as scratch:
        try:
            with tarfile.open(path, "r:") as archive:
                for number, member in enumerate(archive):
                    plain = member.isreg() and not member.issparse()  # holes could be larger than any disk
                    if not plain or number >= MEMBER_LIMIT:
                        why = (
                            f"{member.name[:80]!r} is not a regular file" if number < MEMBER_LIMIT else "too many files"
                        )
                        raise InputRejected("not a device bundle", where=str(path), why=why)
                    archive.extract(member, scratch, filter="data")
        except (tarfile.TarError, OSError, ValueError) as error:
            raise InputRejected("the tar cannot be read", where=str(path), why=str(error)) from error
        tops = list(Path(scratch).iterdir())
        if len(tops) != 1 or not tops[0].is_dir():
            raise InputRejected("not a device bundle", where=str(path), why="it does not hold exactly one folder")
        yield tops[0]
