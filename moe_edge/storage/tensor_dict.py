"""A dictionary of tensors in one safetensors file: what moe-edge keeps between stages, and state that a run needs to go on.

Checkpoints of models have their own doors (checkpoint.py, tensor_files.py).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_edge.contracts.errors import InputRejected

HEADER_KEY = "moe-edge"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """A safetensors file with a JSON header, atomically: written as `path.tmp`, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, temporary, metadata={HEADER_KEY: json.dumps(header, sort_keys=True)})
    os.replace(temporary, path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors and the JSON header of a file that `save_tensors` wrote.

    Raises:
        InputRejected: missing, truncated or foreign file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # clone: the file may be replaced while its tensors are in use
            tensors = {name: torch.clone(file.get_tensor(name)) for name in file.keys()}
        return tensors, json.loads(metadata[HEADER_KEY])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputRejected("cannot read a moe-edge tensor file", where=str(path), why=str(error)) from error


def load_weights_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a file of weights without a header of ours, as transformers writes it into training checkpoints.

    Raises:
        InputRejected: no such file, or not a whole safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputRejected("a file of weights cannot be read", where=str(path), why=str(error)) from error
