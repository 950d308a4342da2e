"""Opening and writing checkpoint folders as transformers models, without network, remote code or pickle.

`load_model` and `load_tokenizer` refuse what would run foreign code; `save_student` writes a folder that transformers 4
and 5, llama.cpp and vLLM all read the same way (they look for the expert count under different names).
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from moe_edge.contracts.checkpoint import Checkpoint, CheckpointHeaders, Teacher
from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.families import family_of, known_family, student_family
from moe_edge.storage.checkpoint import checkpoint_digest, copy_to_place, inspect_checkpoint, tokenizer_files
from moe_edge.storage.files import read_json, write_json_atomic

SHARD_SIZE = "4GB"
HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
GENERATION = "generation_config.json"
_END_FILES = ((GENERATION,), ("config.json",), ("genai_config.json", "model"))  # (file, *keys inside)
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# It says that it will unpack MXFP4, and how to avoid that; unpacking is what `load_model` asks for.
logging.getLogger("transformers.quantizers.quantizer_mxfp4").setLevel(logging.ERROR)
disable_progress_bar()  # type: ignore[no-untyped-call]  # of transformers; ours are those of process/progress.py


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal language model of a checked folder, in eval mode on the CPU.

    Raises:
        ConfigError: no such folder.
        InputRejected: corrupt, unsafe, dense or unsupported, or its tensors do not fit its config.json.
    """
    headers = inspect_checkpoint(Path(path), require_tokenizer=False)
    family_of(headers.config).tensors(headers.config, headers.tensors)
    stored_dtype(headers)
    config = load_config(headers)
    if headers.packed:  # transformers removes it once it is done
        config.quantization_config = {"quant_method": "mxfp4", "dequantize": True}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(path),
        config=config,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    if headers.packed:  # or it would be saved under the names of the packed tensors
        model._weight_conversions = None  # type: ignore[assignment]  # torch declares tensors and modules only
    model.eval()  # type: ignore[no-untyped-call]
    return model


def load_config(headers: CheckpointHeaders) -> PreTrainedConfig:
    """The configuration of a checked folder, without quantization, and untied where a head of its own is stored.

    Raises:
        InputRejected: transformers refuses it.
    """
    path = headers.folder
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # every config class validates in its own way
        raise InputRejected("transformers refuses config.json", where=str(path), why=_first_line(error)) from error
    if hasattr(config, "quantization_config"):  # MXFP4: every reader unpacks it, and what is saved is plain
        del config.quantization_config
    if hasattr(config, "auto_map"):  # of code that nobody runs; a student has none
        del config.auto_map
    if headers.config.get("tie_word_embeddings") is False:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def stored_dtype(headers: CheckpointHeaders) -> torch.dtype:
    """The dtype of a checkpoint's tensors; float32, which loses nothing, when they differ.

    Tensors that transformers keeps in float32 anyway, and those that it does not load, do not count.

    Raises:
        InputRejected: integers or 8-bit floats, that is a quantized checkpoint.
    """
    family = known_family(headers.config)
    kept, skipped = (family.float32, family.skipped(headers.config)) if family else ((), ())
    loaded = {name: info.dtype for name, info in headers.tensors.items() if not name.startswith(skipped)}
    kinds = {dtype for name, dtype in loaded.items() if dtype != "F32" or not name.endswith(kept)}
    foreign = sorted(kinds - set(_DTYPES))
    if foreign:
        why = f"found {', '.join(foreign)}; expected one of {', '.join(_DTYPES)}"
        raise InputRejected("a quantized checkpoint is not supported", where=str(headers.folder), why=why)
    return _DTYPES[kinds.pop()] if len(kinds) == 1 else torch.float32


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a folder.

    Raises:
        InputRejected: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception on a broken file
        raise InputRejected("the tokenizer cannot be read", where=str(path), why=_first_line(error)) from error


def true_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """How many of a head's rows stand for tokens: the ids that the tokenizer can produce; the rows beyond are padding."""
    return min(rows, max(tokenizer.get_vocab().values()) + 1)


def configured_ends(folder: Path) -> dict[str, list[int]]:
    """{configuration file: the ids that it says end a text}, in the order in which they count.

    A missing or broken file names none: what must hold of it is checked where it matters.
    """
    ends = {}
    for name, *keys in _END_FILES:
        try:
            found: Any = json.loads((folder / name).read_bytes())
            for key in (*keys, "eos_token_id"):
                found = found[key]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
        ids = [end for end in (found if isinstance(found, list) else [found]) if isinstance(end, int)]
        if ids:
            ends[name] = ids
    return ends


def resolve_teacher(path_or_id: str, revision: str | None = None, role: str = "teacher") -> Path:
    """A folder for a path or a hub id; the hub is asked only for ids, and only for safetensors and text files.

    Args:
        role: what an error calls the model.

    Raises:
        ConfigError: the folder does not exist, or the hub has not given the model.
    """
    folder = Path(os.path.expanduser(path_or_id))  # which leaves the home of an unknown user as it is
    if path_or_id and folder.is_dir():
        return folder
    if not path_or_id or folder.exists() or not _looks_like_id(path_or_id):
        raise ConfigError(f"the {role} is not a folder", where=path_or_id, why="expected a checkpoint folder or hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_id, revision=revision, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # the hub client raises dozens of types: offline, unknown id, gated, proxy
        why = f"no such folder, and the hub failed: {_first_line(error)}"
        command = f"hf download {path_or_id} --local-dir DIR, then pass DIR"
        raise ConfigError(f"the {role} cannot be found", where=path_or_id, why=why, next_command=command) from error


def read_checkpoint(folder: Path, name: str | None = None, *, students: bool = False) -> Checkpoint:
    """A folder whose headers were checked; no weight is read.

    Args:
        name: for people and file names, default the folder's.
        students: take dense students, too.

    Raises:
        ConfigError: no such folder.
        InputRejected: it is corrupt, unsafe or unsupported.
    """
    headers = inspect_checkpoint(folder)
    family = (student_family if students else family_of)(headers.config)
    family.tensors(headers.config, headers.tensors)
    return Checkpoint(folder, name or folder.name, headers, family.spec(headers.config))


def hashed(found: Checkpoint) -> Teacher:
    """The same with its digest, which reads the whole of a file that has changed."""
    return Teacher(found.path, found.name, found.headers, found.spec, checkpoint_digest(found.path))


def _looks_like_id(text: str) -> bool:
    return not text.startswith((".", "/", "~")) and text.count("/") <= 1 and "\\" not in text


def save_student(model: PreTrainedModel, tokenizer_source: Path, out: Path) -> None:
    """Write `model` in its own dtype with the tokenizer and generation files of `tokenizer_source`.

    The same model gives the same bytes. Generation settings are copied as they are, because transformers refuses to
    save some that it loads.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings, model.generation_config = model.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        model.save_pretrained(out, max_shard_size=SHARD_SIZE)
    finally:
        model.generation_config = settings
    (out / GENERATION).unlink(missing_ok=True)
    complete_student(tokenizer_source, out)


def complete_student(tokenizer_source: Path, out: Path) -> None:
    """Put the teacher's tokenizer and generation files beside saved weights, and the student's keys into config.json."""
    given = tokenizer_source / GENERATION
    copy_to_place([*tokenizer_files(tokenizer_source), *([given] if given.is_file() else [])], out)
    write_json_atomic(out / "config.json", student_config(read_json(out / "config.json")))


def student_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a student: what transformers 5 renamed stands under all its names, since other tools read the old
    ones (the expert count, the rotation), and there are no layers that predict further tokens, since none is saved.
    """
    config = config | _older_rotation(config)
    family = known_family(config)
    if family is None:  # a dense student
        return config
    nested = config.get(family.nested_key) if family.nested_key else None
    if isinstance(nested, dict):
        config |= {str(family.nested_key): nested | _older_rotation(nested)}
    count = family.expert_count(config)
    absent = {family.mtp_key: 0} if family.mtp_key in config else {}
    return config | dict.fromkeys(family.expert_keys, count) | absent


def _older_rotation(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `partial_rotary_factor` as readers before transformers 5 look for them.

    `type` stands beside `rope_type` in the scaling, because modeling files of released models ask for the former.
    """
    given = config.get("rope_parameters")
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        return {}  # none, or one for each kind of layer, which the old keys cannot say
    own = ("rope_theta", "partial_rotary_factor")
    found = {key: given[key] for key in own if given.get(key) is not None}
    kind = given.get("rope_type") or given.get("type") or "default"
    scaling = {key: value for key, value in given.items() if key not in own} | {"rope_type": kind, "type": kind}
    scaled = kind != "default" or len(scaling) > 2
    if (share := found.get("partial_rotary_factor")) and config.get("model_type") == "minimax_m2":
        found["rotary_dim"] = int(config["head_dim"] * share)  # the only key that transformers 4 reads
    return found | {"rope_scaling": scaling if scaled else None}
