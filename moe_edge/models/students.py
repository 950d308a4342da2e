"""Students, whatever action made them: plain mixtures, dense ones, and those with shared cores; read, written, described.

A folder named `model` always holds a plain checkpoint: a model with shared cores is folded on the way into it, and its
trainable form is written elsewhere, with the file that builds it outside moe-edge. A file from a model folder is never
run here; `auto_map` is accepted only where it names exactly what this package builds itself (storage/checkpoint.py).

Descriptions are made of headers and the neutral tensor map alone. The plan, the report and the compressor's summary all
count parameters here (`count_params`), so that they cannot disagree.
"""

import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.spec import EXPERT_OWNED, ModelSpec, TensorClass, TensorEntry
from moe_edge.families import FAMILIES, family_of
from moe_edge.models import shared_core
from moe_edge.models.dense import DENSE_TYPES
from moe_edge.models.kernels import fastest_kernel
from moe_edge.models.loading import load_config, load_model, save_student, stored_dtype
from moe_edge.models.views import moe_layers
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.files import read_json, write_json_atomic
from moe_edge.storage.folders import mirror, written_beside

TRAINABLE = "shared_core"  # folder of the trainable form, beside `model`


def load_student(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a student's folder, whatever action made it, in eval mode on the CPU.

    Raises:
        ConfigError, InputRejected: as `load_model`.
    """
    headers = inspect_checkpoint(Path(path), require_tokenizer=False)
    kind = headers.config.get("model_type")
    if kind == shared_core.MODEL_TYPE:
        base = headers.config.get("base_model_type")
        if base not in FAMILIES:
            why = f"base_model_type is {base!r}; supported: {', '.join(FAMILIES)}"
            raise InputRejected("unknown family below shared cores", where=str(headers.folder), why=why)
        config = shared_core.config_class(base).from_dict(headers.config)
        return _read(headers, shared_core.model_class(base), dtype, config=config)
    if kind in DENSE_TYPES:
        return _read(headers, AutoModelForCausalLM, dtype, trust_remote_code=False, config=load_config(headers))
    return load_model(path, dtype)


def _read(headers: CheckpointHeaders, built: Any, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Raises InputRejected unless every tensor finds its place; transformers would fill the others with noise."""
    stored_dtype(headers)
    folder = str(headers.folder)
    try:
        loaded: tuple[PreTrainedModel, dict[str, Any]] = built.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # every model class has its own way to say no
        raise InputRejected("the checkpoint does not fit its config.json", where=folder, why=str(error)) from error
    model, info = loaded
    wrong = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]))
    if wrong:
        why = f"{len(wrong)} tensors are missing, unknown or of another shape, first: {wrong[0]}"
        raise InputRejected("the checkpoint does not fit its config.json", where=folder, why=why)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def trainable_folder(compressed: Path) -> Path:
    """The folder in `compressed` that distillation starts from: the trainable form, where there is one."""
    return compressed / (TRAINABLE if (compressed / TRAINABLE).is_dir() else "model")


def is_shared_core(model: PreTrainedModel) -> bool:
    """Has the model shared cores, not yet folded?"""
    return model.config.model_type == shared_core.MODEL_TYPE


def is_mixture(model: PreTrainedModel) -> bool:
    """Has the model routers and ordinary experts?"""
    return not is_shared_core(model) and model.config.model_type not in DENSE_TYPES


def plain_form(model: PreTrainedModel) -> PreTrainedModel:
    """A student as a plain model: the same object, or a new one with ordinary experts in the place of shared cores."""
    return shared_core.fold(model) if is_shared_core(model) else model


def save_trainable(model: PreTrainedModel, tokenizer_source: Path, out: Path) -> None:
    """Write a model with shared cores as it is, with its modeling file, whole or not at all."""
    with written_beside(out) as folder:
        save_student(model, tokenizer_source, folder)
        shutil.copyfile(shared_core.__file__, folder / shared_core.MODELING_FILE)
        config = read_json(folder / "config.json")
        config["architectures"] = [shared_core.SharedCoreForCausalLM.__name__]
        write_json_atomic(folder / "config.json", config)


def mirror_student(source: Path, out: Path) -> None:
    """Make `out / model`, and the trainable form where there is one, twins of those in `source`."""
    for name in ("model", TRAINABLE):
        if (source / name).is_dir():
            mirror(source / name, out / name)


def use_fastest_experts(model: PreTrainedModel) -> None:
    """Choose the fastest experts kernel for a CPU, where the model has ordinary experts."""
    if not is_mixture(model):
        return
    view = moe_layers(model)[0]
    model.set_experts_implementation(fastest_kernel(view.top_k, view.count))


def describe_student(headers: CheckpointHeaders) -> dict[str, Any]:
    """As `describe_model`; a dense student has one expert that every token uses, and no routed weights."""
    if headers.config.get("model_type") not in DENSE_TYPES:
        return describe_model(headers)
    total = sum(prod(info.shape) for info in headers.tensors.values())
    return {
        "family": headers.config["model_type"],
        "layers": headers.config["num_hidden_layers"],
        "params_total": total,
        "params_active": total,
        "params_routed": 0,
        "experts": 1,
        "top_k": 1,
        "bytes": headers.total_bytes,
    }


def describe_model(headers: CheckpointHeaders) -> dict[str, Any]:
    """What a report says of a checkpoint, from headers only: params_total, params_active, experts, top_k, bytes, ...

    Experts are per layer; of a padded student on average, and `experts_per_layer` has them all.

    Raises:
        InputRejected: the model is not supported, or its tensors do not fit its config.
    """
    family = family_of(headers.config)
    spec = family.spec(headers.config)
    counts = count_params(spec, family.tensors(headers.config, headers.tensors))
    uneven = spec.moe.experts_per_layer
    return {
        "family": spec.family,
        "layers": spec.layers,
        "params_total": counts.total,
        "params_active": counts.active,
        "params_routed": counts.routed,
        "experts": round(sum(uneven) / len(uneven)) if uneven else spec.moe.experts,
        "top_k": spec.moe.top_k,
        "bytes": headers.total_bytes,
    } | ({"experts_per_layer": list(uneven)} if uneven else {})


@dataclass(frozen=True)
class ParamCounts:
    """Numbers of weights; tied embeddings count once."""

    total: int
    active: int  # used for one token: everything but the experts that the router leaves out
    routed: int  # in routed experts
    by_class: dict[TensorClass, int]


def count_params(spec: ModelSpec, entries: Iterable[TensorEntry]) -> ParamCounts:
    """Count the weights of `entries` (a whole model's map); padding experts are none."""
    by_class: Counter[TensorClass] = Counter()
    idle = 0
    for entry in entries:
        shape = spec.real_shape(entry)
        by_class[entry.tensor_class] += prod(shape)
        idle += prod(shape[1:]) * (shape[0] - spec.moe.top_k) if entry.tensor_class in EXPERT_OWNED else 0
    total = sum(by_class.values())
    routed = sum(by_class[name] for name in EXPERT_OWNED)
    return ParamCounts(total, total - idle, routed, dict(by_class))
