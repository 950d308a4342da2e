"""A checkpoint folder as values: its configuration, where each tensor lies, and the teacher of a command.

storage/checkpoint.py fills them in from the headers of the files; no weight is read for them. Torch-free.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from moe_edge.contracts.spec import ModelSpec


@dataclass(frozen=True)
class Packed:
    """The two tensors of a file that stand for one of the model (storage/mxfp4.py)."""

    blocks: "TensorInfo"
    scales: "TensorInfo"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: where it lies and how large it is."""

    name: str
    file: str
    dtype: str  # as safetensors writes it: F32, F16, BF16, ...
    shape: tuple[int, ...]
    bytes: int
    offset: int  # of its first byte in the file
    # What lies in the file instead; dtype, shape and bytes are those of the unpacked tensor.
    packed: Packed | None = None

    @property
    def files(self) -> set[str]:
        """Names of the files that hold it."""
        return {self.file} if self.packed is None else {self.packed.blocks.file, self.packed.scales.file}


@dataclass(frozen=True)
class CheckpointHeaders:
    """What a checkpoint folder says about itself; no weight has been read."""

    folder: Path
    config: dict[str, Any]  # config.json
    tensors: dict[str, TensorInfo]
    total_bytes: int  # of all tensors as they are read, without headers

    @property
    def packed(self) -> bool:
        """Are there MXFP4 tensors in the files? `config` and `tensors` describe the model without them."""
        return any(info.packed is not None for info in self.tensors.values())

    @property
    def weights(self) -> int:
        """Numbers in all tensors."""
        return sum(prod(info.shape) for info in self.tensors.values())


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was found and whose headers were checked: all that a plan needs."""

    path: Path
    name: str  # for people and file names
    headers: CheckpointHeaders
    spec: ModelSpec


@dataclass(frozen=True)
class Teacher(Checkpoint):
    """The checkpoint that a command starts from; found, checked and hashed once, then handed on."""

    digest: str  # "sha256:..." over the folder's content
