"""Checkpoint folders: checked from their headers alone, read one tensor at a time, and identified by a digest.

A folder may come from anywhere. Nothing is unpickled, no path leaves the folder, and every number of a safetensors
header is checked against the file before a tensor is read (safetensors_header.py).
"""

import hashlib
import logging
import shutil
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moe_edge.contracts.capability_table import CAPABILITIES
from moe_edge.contracts.checkpoint import CheckpointHeaders, TensorInfo
from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.storage.cache import remembered_sha256
from moe_edge.storage.files import CHUNK_BYTES, read_json, refuse_lfs_pointer
from moe_edge.storage.mxfp4 import dequantize, is_mxfp4, unpacked
from moe_edge.storage.safetensors_header import read_header

log = logging.getLogger(__name__)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES_FOLDER = "additional_chat_templates"  # NAME.jinja, which transformers reads beside the default
_FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_BACKEND_KEYS = ("attn_implementation", "experts_implementation")
_BUILT_IN = {family for _, family in CAPABILITIES}  # model types whose classes come from transformers
_OWN_BACKENDS = (None, "eager", "sdpa", "grouped_mm", "batched_mm", "flash_attention_2", "flex_attention")
# A model with shared cores (models/shared_core.py) names its modeling file for users of transformers alone. We never run
# that file either: the classes come from this package.
SHARED_CORE_TYPE = "moe_edge_shared_core"
SHARED_CORE_AUTO_MAP = {
    "AutoConfig": "modeling_shared_core.SharedCoreConfig",
    "AutoModelForCausalLM": "modeling_shared_core.SharedCoreForCausalLM",
}


def inspect_checkpoint(folder: Path, require_tokenizer: bool = True) -> CheckpointHeaders:
    """Check a Hugging Face checkpoint folder from its headers alone.

    Raises:
        ConfigError: there is no such folder.
        InputRejected: anything in it is missing, corrupt, unsafe or contradictory; the message names the file.
    """
    if not folder.is_dir():
        raise ConfigError("the checkpoint folder does not exist", where=str(folder))
    config = _without_foreign_code(read_json(folder / "config.json"), folder / "config.json")
    _refuse_foreign_code(config, folder / "config.json")
    tensors = _read_tensors(folder)
    if is_mxfp4(config):
        tensors, config = unpacked(tensors, folder), {k: v for k, v in config.items() if k != "quantization_config"}
    if _has_own_head(tensors, folder):
        config = _untied(config)
    if require_tokenizer:
        _check_tokenizer(folder)
    return CheckpointHeaders(folder, config, tensors, sum(info.bytes for info in tensors.values()))


def _has_own_head(tensors: dict[str, TensorInfo], folder: Path) -> bool:
    """Is a head stored that differs from the embedding? Then it counts, whatever config.json says of tied embeddings."""
    head = tensors.get("lm_head.weight")
    names = [name for name in tensors if name.endswith("embed_tokens.weight")]
    if head is None or not names:
        return False
    embedding = tensors[min(names, key=len)]  # layers that predict further tokens may have one, too
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return True
    states = tuple((folder / info.file).stat().st_mtime_ns for info in (head, embedding))
    return _differ(folder, head, embedding, states)


@lru_cache(maxsize=64)
def _differ(folder: Path, one: TensorInfo, two: TensorInfo, states: tuple[int, ...]) -> bool:
    """Do two tensors of one size have different bytes? Ends at the first difference; `states` tells rewritten files apart."""
    with (folder / one.file).open("rb") as first, (folder / two.file).open("rb") as second:
        first.seek(one.offset)
        second.seek(two.offset)
        for start in range(0, one.bytes, CHUNK_BYTES):
            size = min(CHUNK_BYTES, one.bytes - start)
            if first.read(size) != second.read(size):
                return True
    return False


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with a head of its own, under every key and in every part where it may say otherwise."""
    parts = {key: _untied(value) for key, value in config.items() if key == "text_config" and isinstance(value, dict)}
    older = {"tie_embedding": False} if "tie_embedding" in config else {}
    return config | parts | older | {"tie_word_embeddings": False}


def _without_foreign_code(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """`config` without `auto_map` where transformers has the model itself: released folders name code that preceded it."""
    if str(config.get("model_type")) not in _BUILT_IN:
        return config
    parts = {key: value for key, value in config.items() if key == "text_config" and isinstance(value, dict)}
    if not any("auto_map" in part for part in (config, *parts.values())):
        return config
    _say_ignored(path)
    inner = {key: {name: value for name, value in part.items() if name != "auto_map"} for key, part in parts.items()}
    return {key: value for key, value in config.items() if key != "auto_map"} | inner


@lru_cache(maxsize=64)
def _say_ignored(path: Path) -> None:
    """Once per folder and process."""
    log.warning(
        "%s: auto_map is ignored: transformers has this model itself, the folder's code is never executed", path
    )


def _refuse_foreign_code(config: dict[str, Any], path: Path) -> None:
    """Raises InputRejected when a config names code to run: `auto_map`, or a kernel of the hub as its backend."""
    for level in _objects(config):
        if "auto_map" in level and not (level is config and is_own_code(config)):
            raise InputRejected("the model asks for its own code", where=f"{path}: auto_map", why="never executed")
        for key, value in level.items():
            names_backend = key.endswith("_implementation_internal") or (
                key.lstrip("_") in _BACKEND_KEYS and value not in _OWN_BACKENDS
            )
            if names_backend:
                why = f"{value!r} could be a kernel downloaded from the hub"
                raise InputRejected("the config names a foreign backend", where=f"{path}: {key}", why=why)


def is_own_code(config: dict[str, Any]) -> bool:
    """Does `auto_map` name what moe-edge writes beside shared cores, and builds from its own package?"""
    return config.get("model_type") == SHARED_CORE_TYPE and config.get("auto_map") == SHARED_CORE_AUTO_MAP


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """`value` and everything inside it that is a JSON object."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_shards(folder, _weight_map(folder / INDEX))
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        why = f"found only {pickles[0]}; pickle files can run code and are never opened"
        command = "save the model with save_pretrained(..., safe_serialization=True)"
        raise InputRejected("no safetensors weights", where=str(folder), why=why, next_command=command)
    raise InputRejected("no weights", where=str(folder), why=f"expected {SINGLE} or {INDEX}")


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name, with every file name checked to lie directly in the folder."""
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise InputRejected("the index has no weight_map", where=str(path))
    for name, shard in found.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and not set(shard) & set("/\\:\0")
        if not plain or shard.startswith("."):
            why = f"tensor {name} lies in {shard!r}; expected a plain *.safetensors name"
            raise InputRejected("the index points outside the folder", where=str(path), why=why)
    return found


def _read_shards(folder: Path, weight_map: dict[str, str]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise InputRejected("a shard is missing", where=str(folder / shard), why=f"{INDEX} lists it")
        tensors |= {
            name: info for name, info in read_header(folder / shard).items() if weight_map.get(name, shard) == shard
        }
    wrong = sorted(set(weight_map) ^ set(tensors))
    if wrong:
        why = f"{len(wrong)} tensors are in only one of them, first: {wrong[0]}"
        raise InputRejected("index and shards disagree", where=str(folder / INDEX), why=why)
    return tensors


def require_tokenizer_files(folder: Path) -> None:
    """Raises InputRejected when the folder has no vocabulary."""
    if not any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
        why = "expected tokenizer.json, tokenizer.model, or vocab.json with merges.txt"
        raise InputRejected("the tokenizer is missing", where=str(folder), why=why)


def _check_tokenizer(folder: Path) -> None:
    require_tokenizer_files(folder)
    for path in tokenizer_files(folder):
        refuse_lfs_pointer(path)
        if path.suffix == ".json":
            _refuse_foreign_code(read_json(path) if path.name == "tokenizer_config.json" else {}, path)


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer and chat-template files that are present, in a fixed order."""
    named = sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))
    return [path for path in (*(folder / name for name in TOKENIZER_FILES), *named) if path.is_file()]


def tokenizer_place(path: Path) -> Path:
    """Where one of `tokenizer_files` lies inside its checkpoint: named chat templates have a folder of their own."""
    return Path(TEMPLATES_FOLDER, path.name) if path.parent.name == TEMPLATES_FOLDER else Path(path.name)


def copy_to_place(files: Iterable[Path], out: Path) -> None:
    """Copy files of a checkpoint into the folder `out`, each to its `tokenizer_place`."""
    for source in files:
        (place := out / tokenizer_place(source)).parent.mkdir(exist_ok=True)
        shutil.copyfile(source, place)


class TensorReader:
    """Reads tensors of a checked folder one at a time through memory-mapped safetensors."""

    def __init__(self, folder: Path) -> None:
        """Raises what `inspect_checkpoint` raises; tokenizer files are not required."""
        self.headers = inspect_checkpoint(folder, require_tokenizer=False)
        self._open: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        return list(self.headers.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers.tensors)

    def get(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, MXFP4 as bfloat16. Raises InputRejected when there is none of this name."""
        info = self.headers.tensors.get(name)
        if info is None:
            raise InputRejected("no such tensor", where=f"{self.headers.folder}: {name}")
        if info.packed is not None:
            return dequantize(self._stored(info.packed.blocks), self._stored(info.packed.scales))
        return self._stored(info)

    def _stored(self, info: TensorInfo) -> torch.Tensor:
        if info.file not in self._open:
            self._open[info.file] = safe_open(str(self.headers.folder / info.file), framework="pt")
        tensor: torch.Tensor = self._open[info.file].get_tensor(info.name)
        return tensor


def checkpoint_digest(folder: Path) -> str:
    """The identity of a checkpoint: SHA-256 over the sorted (name, SHA-256) of all files that matter to its behaviour.

    Hashes of large files are remembered (see cache.py), so that only the first call reads them.

    Raises:
        InputRejected: as `inspect_checkpoint`, or a weight is NaN or infinite, which is seen while the files are hashed.
    """
    headers = inspect_checkpoint(folder, require_tokenizer=False)
    weights = {name for info in headers.tensors.values() for name in info.files}
    names = {tokenizer_place(path).as_posix() for path in tokenizer_files(folder)} | {"config.json"} | weights
    names |= {name for name in (INDEX, "generation_config.json") if (folder / name).is_file()}
    digest = hashlib.sha256()
    for name in sorted(names):
        hashing = sha256_of_finite if name in weights else None
        digest.update(f"{name}\0{remembered_sha256(folder / name, hashing)}\n".encode())
    return digest.hexdigest()


def sha256_of_finite(path: Path) -> str:
    """The SHA-256 of a safetensors file in hexadecimal. Raises InputRejected when a number in it is NaN or infinite."""
    infos = read_header(path).values()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(min((info.offset for info in infos), default=-1)))
        for info in infos:
            for start in range(0, info.bytes, CHUNK_BYTES):
                raw = bytearray(file.read(min(CHUNK_BYTES, info.bytes - start)))
                digest.update(raw)
                if info.dtype in _FLOATS:
                    refuse_nonfinite(torch.frombuffer(raw, dtype=_FLOATS[info.dtype]), f"{path}: {info.name}")
    return digest.hexdigest()


def refuse_nonfinite(values: torch.Tensor, where: str) -> None:
    """Raises InputRejected when a number is NaN or infinite; `where` names the tensor."""
    if not values.numel():
        return
    wide = values.bfloat16() if values.itemsize == 1 else values
    if not torch.stack(wide.aminmax()).isfinite().all():  # NaN is both the least and the largest
        why = "a model with such a weight computes nothing; the file is damaged, or its training diverged"
        raise InputRejected("a weight is NaN or infinite", where=where, why=why)
