"""SHA-256 of large files, remembered across calls and runs under (path, size, modification time, inode).

The memo is a convenience: a missing, corrupt or unwritable memo file only costs time. It lies in the cache folder.
"""

import json
import logging
from pathlib import Path

from moe_edge.storage.cache import cache_root
from moe_edge.storage.files import sha256_file, write_json_atomic

log = logging.getLogger(__name__)
MEMO_NAME = "digests.json"
SMALL_BYTES = 1 << 20  # smaller files are hashed every time
MEMO_ENTRIES = 4096
_known: dict[str, str] = {}


def remembered_sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal; a large file is read only when it changed since the last call."""
    state = path.stat()
    if state.st_size < SMALL_BYTES:
        return sha256_file(path)
    key = f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}|{state.st_ino}"
    if key not in _known:
        _known.update(_read_memo())
    if key not in _known:
        _known[key] = sha256_file(path)
        _write_memo()
    return _known[key]


def _read_memo() -> dict[str, str]:
    try:
        memo = json.loads((cache_root() / MEMO_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(memo, dict):
        return {}
    return {key: value for key, value in memo.items() if isinstance(value, str) and len(value) == 64}


def _write_memo() -> None:
    newest = dict(list((_read_memo() | _known).items())[-MEMO_ENTRIES:])
    try:
        write_json_atomic(cache_root() / MEMO_NAME, newest)
    except OSError as error:
        log.debug("digests are not remembered: %s", error)
