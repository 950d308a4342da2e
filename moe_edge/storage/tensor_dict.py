"""A plain dictionary of tensors in one safetensors file, for state that only moe-edge itself writes and reads.

Checkpoints of models have their own doors (checkpoint.py, tensor_files.py); this one serves a stage's scratch state, such
as what a training run needs to go on.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_edge.contracts.errors import InputRejected


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a dictionary of tensors, copied to the CPU; parents are created.

    The file is not renamed into place: its folder counts only with the marker of whoever owns it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The dictionary that `save_tensors` wrote.

    Raises:
        InputRejected: no such file, or not a whole safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputRejected("a file of tensors cannot be read", where=str(path), why=str(error)) from error
