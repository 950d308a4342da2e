"""What kind of model lies at a path, told by its content and never by its name; and is its header sane.

Nothing here needs torch or a runtime, so that a command refuses a crafted file before it has imported any of them.
"""

from pathlib import Path
from typing import Literal, NamedTuple

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.runtimes.gguf_header import check_gguf_header, parts_of
from moe_edge.runtimes.onnx_header import inspect_onnx
from moe_edge.storage.safetensors_header import read_header

GGUF_MAGIC = b"GGUF"


class Kind(NamedTuple):
    """A format and the runtime that runs it."""

    format: Literal["gguf", "onnx", "hf"]
    runtime: Literal["llama_cpp", "ort", "hf"]


GGUF, ONNX, HF = Kind("gguf", "llama_cpp"), Kind("onnx", "ort"), Kind("hf", "hf")


def detect(path: Path) -> Kind:
    """The kind of an artifact.

    Raises:
        ConfigError: nothing is there.
        InputRejected: it is none of the three kinds.
    """
    if not path.exists():
        raise ConfigError(
            "no such artifact", where=str(path), next_command="moe-edge bench FILE.gguf | ONNX_FOLDER | HF_FOLDER"
        )
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(GGUF_MAGIC)) == GGUF_MAGIC:
                return GGUF
    elif (path / "model.onnx").is_file():
        return ONNX
    elif (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return HF
    raise InputRejected(
        "not a model that moe-edge can run",
        where=str(path),
        why="an artifact is a GGUF file, a folder with model.onnx, or a folder with config.json and *.safetensors",
    )


def refuse_bad_headers(path: Path) -> Kind:
    """The kind of an artifact whose headers, of all its parts, are sane.

    Raises:
        ConfigError: nothing is there.
        InputRejected: it is none of the three kinds, or a header is damaged or crafted.
    """
    kind = detect(path)
    if kind is GGUF:
        for part in parts_of(path):
            check_gguf_header(part)
    elif kind is ONNX:
        inspect_onnx(path)
    else:
        for shard in sorted(path.glob("*.safetensors")):
            read_header(shard)
    return kind


def weight_bytes(path: Path) -> int:
    """Bytes of the weights: the GGUF file with all its parts, model.onnx*, or all safetensors shards."""
    if path.is_file():
        return sum(part.stat().st_size for part in parts_of(path))
    files = [file for pattern in ("model.onnx*", "*.safetensors") for file in path.glob(pattern)]
    return sum(file.stat().st_size for file in files)
