"""Hand-made checkpoint folders, whole and broken, for the storage tests: no model is ever built."""

import json
from pathlib import Path
from typing import Any

CONFIG = {"model_type": "qwen3_moe", "num_local_experts": 2}
DATA = bytes(range(32))
HEADER: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "__metadata__": {"format": "pt"},
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"


def safetensors_bytes(header: dict[str, Any] | bytes, data: bytes = DATA, length: int | None = None) -> bytes:
    """A safetensors file with any header and any claimed header length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def write_folder(folder: Path, **changes: bytes | None) -> Path:
    """A valid folder, with files replaced or (None) left out; `__` in a keyword is a dot."""
    files: dict[str, bytes | None] = {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors": safetensors_bytes(HEADER),
    }
    files |= {name.replace("__", "."): content for name, content in changes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


def shard_header(name: str) -> dict[str, Any]:
    """A header of one tensor that takes 8 bytes."""
    return {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def write_sharded(folder: Path, weight_map: dict[str, Any] | None = None) -> Path:
    """Two shards, `x` in the first and `y` in the second, and their index."""
    write_folder(folder, model__safetensors=None)
    for number, name in enumerate("xy", 1):
        content = safetensors_bytes(shard_header(name), bytes(8))
        (folder / f"model-0000{number}-of-00002.safetensors").write_bytes(content)
    names = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    index = {"weight_map": names if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
