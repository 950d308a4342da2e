"""What builds of one user share in a cache (`$MOE_EDGE_CACHE`, default ~/.cache/moe-edge): profiles, and digests of files.

A profile is the expensive part of a build and depends on neither target nor plan, so that other builds of the same teacher
reuse it. SHA-256 digests of large files are remembered across calls and runs under path, size, inode, both times of change and
sampled blocks. Everything else lives in the build's own folder. The cache is a convenience: what is missing, damaged or
unwritable there only costs time.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from moe_edge.contracts.manifest import MANIFEST_NAME, Manifest, read_manifest
from moe_edge.storage.files import sha256_file, write_json_atomic
from moe_edge.storage.folders import changed_files, mirror

log = logging.getLogger(__name__)
MEMO_NAME = "digests.json"
SMALL_BYTES = 1 << 20  # smaller files are hashed every time
SAMPLES, SAMPLE_BYTES = 64, 4096
MEMO_ENTRIES = 4096
known_digests: dict[str, str] = {}  # of this process


def cache_root() -> Path:
    """The folder that all builds of this user share: $MOE_EDGE_CACHE, or ~/.cache/moe-edge."""
    return Path(os.environ.get("MOE_EDGE_CACHE") or "~/.cache/moe-edge").expanduser()


def reuse_profile(folder: Path, key: str) -> None:
    """Bring the profile with this key from the cache into `folder`, unless the folder already has it.

    What fails in the cache, because it is read-only or another process empties it, costs the reuse.
    """
    here, home = read_manifest(folder), _profile_home(key)
    kept = read_manifest(home)
    if (here is not None and here.key == key) or kept is None:
        return
    if changed := changed_files(home, kept.files):
        log.warning("the cached profile is damaged and is ignored: %s", ", ".join(changed))
        return
    try:
        mirror(home, folder)
    except OSError as error:
        log.warning("the profile was not taken from the cache: %s", error)
        return
    with suppress(OSError):  # another user's cache; then the garbage collection knows less
        os.utime(home)
    log.info("profile: taken from the cache")


def publish_profile(folder: Path, key: str) -> None:
    """Put a finished profile into the cache; a full disk, or another build that does the same, costs nothing else."""
    home = _profile_home(key)
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(home.with_name(home.name + ".lock"), timeout=0):
            mirror(folder, home)
    except OSError as error:
        log.warning("the profile was not put into the cache: %s", error)


def _profile_home(key: str) -> Path:
    return cache_root() / "profiles" / key.removeprefix("sha256:")


def cached_profiles() -> Iterator[tuple[Path, Manifest]]:
    """Every finished profile in the cache, oldest use first."""
    homes = sorted((cache_root() / "profiles").glob("*/"), key=lambda home: home.stat().st_mtime)
    for home in homes:
        if (manifest := read_manifest(home)) is not None:
            yield home, manifest


def cached_profile_of(teacher_digest: str) -> tuple[Path, Manifest] | None:
    """The last used profile of this very checkpoint, for exports of a plain folder."""
    fitting = [row for row in cached_profiles() if row[1].inputs.get("teacher") == teacher_digest]
    return fitting[-1] if fitting else None


def damaged_profiles() -> dict[Path, list[str]]:
    """Every cached profile that is not what its manifest says, and which of its files; a broken manifest is damage, too."""
    damaged = {}
    for home in sorted((cache_root() / "profiles").glob("*/")):
        manifest = read_manifest(home)
        if changed := [MANIFEST_NAME] if manifest is None else changed_files(home, manifest.files):
            damaged[home] = changed
    return damaged


def bytes_of(manifest: Manifest) -> int:
    """What a profile takes."""
    return sum(entry.bytes for entry in manifest.files.values())


def collect_garbage(keep_bytes: int) -> list[str]:
    """Delete what is damaged or unfinished, then the longest unused, until at most `keep_bytes` remain; names of what went."""
    gone = list(damaged_profiles())
    for home in gone:
        _remove(home)
    rows = list(cached_profiles())
    total = sum(bytes_of(manifest) for _, manifest in rows)
    for home, manifest in rows:
        if total <= keep_bytes:
            break
        _remove(home)
        total -= bytes_of(manifest)
        gone.append(home)
    return [home.name for home in gone]


def _remove(home: Path) -> None:
    """Of a link only the link: what it names is not the cache's."""
    if home.is_symlink():
        home.unlink()
    else:
        shutil.rmtree(home)


def remembered_sha256(path: Path, hashing: Callable[[Path], str] | None = None) -> str:
    """The SHA-256 of a file in hexadecimal; a large file is read only when it changed since the last call.

    Args:
        hashing: computes it in the place of `sha256_file`, and may check what it reads; it has entries of its own.
    """
    state = path.stat()
    if state.st_size < SMALL_BYTES:
        return (hashing or sha256_file)(path)
    key = f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}|{state.st_ctime_ns}|{state.st_ino}|{_sampled(path)}"
    if hashing is not None:
        key += f"|{hashing.__name__}"
    if key not in known_digests:
        known_digests.update(_read_memo())
    if key not in known_digests:
        known_digests[key] = (hashing or sha256_file)(path)
        _write_memo()
    return known_digests[key]


def _sampled(path: Path) -> str:
    """A hash of blocks at even distances, the first and the last among them: times alone may be set back or be coarse."""
    last = path.stat().st_size - SAMPLE_BYTES
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(last * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _read_memo() -> dict[str, str]:
    try:
        memo = json.loads((cache_root() / MEMO_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(memo, dict):
        return {}
    return {key: value for key, value in memo.items() if isinstance(value, str) and len(value) == 64}


def _write_memo() -> None:
    newest = dict(list((_read_memo() | known_digests).items())[-MEMO_ENTRIES:])
    try:
        write_json_atomic(cache_root() / MEMO_NAME, newest)
    except OSError as error:
        log.debug("digests are not remembered: %s", error)
