"""What config.json and the safetensors headers alone say about a model: its spec and every tensor's class and shape.

Reading them takes a second at most and no weights, so a plan can be refused before hours are spent. Tensors of one
class, shape and third of the layers are counted together: a model has thousands of tensors and about forty different
ones.

Shape suffixes: E experts, D model, F expert width, V vocabulary.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.quantization import layer_thirds
from moe_edge.contracts.spec import EXPERT_CLASSES, EXPERT_OWNED, EXPERT_SIZED, ModelSpec, TensorClass
from moe_edge.families import student_family
from moe_edge.storage.files import read_json

Shape = tuple[int, ...]
_Key = tuple[TensorClass, Shape, int | None, str]  # class, shape, first layer of the third, part


class Group(NamedTuple):
    """Equal tensors of one third of the layers."""

    tensor_class: TensorClass
    shape: Shape  # of one tensor
    tensors: int  # how many of them
    layer: int | None  # the first layer of the third; None: outside the layers
    part: str = "weight"  # of other attention, where it says what the matrix is
    layers: tuple[int, ...] = ()  # of each tensor


@dataclass(frozen=True)
class ModelHeaders:
    """A model as the planner sees it."""

    spec: ModelSpec
    groups: tuple[Group, ...]
    checkpoint_bytes: int  # of the teacher's tensors
    tokenizer_bytes: int  # what the vocabulary and merges take inside a GGUF

    def with_experts(self, experts: int, width: int | None = None) -> tuple[Group, ...]:
        """The same tensors after every layer keeps `experts` experts of `width` neurons (None: as they are)."""
        return tuple(group._replace(shape=self._shape(group, experts, width)) for group in self.groups)

    def _shape(self, group: Group, experts: int, width: int | None) -> Shape:
        if group.tensor_class not in EXPERT_SIZED:
            return group.shape
        shape = (experts, *group.shape[1:])
        if width is None or group.tensor_class not in EXPERT_CLASSES:
            return shape
        return (*shape[:2], width) if group.tensor_class == "expert_down" else (experts, width, *shape[2:])

    def params_total(self, experts: int, width: int | None = None) -> int:
        """Parameters with `experts` experts per layer; a tied head is counted once."""
        return sum(group.tensors * prod(group.shape) for group in self.with_experts(experts, width))

    @property
    def bytes_at_16_bits(self) -> int:
        """Of the teacher's weights, whatever its checkpoint stores them in."""
        return 2 * self.params_total(self.spec.moe.experts)

    def params_active(self, experts: int, top_k: int, width: int | None = None) -> int:
        """Parameters that one token uses: all but the experts it is not routed to."""
        groups = self.with_experts(experts, width)
        routed = sum(group.tensors * prod(group.shape) for group in groups if group.tensor_class in EXPERT_OWNED)
        return self.params_total(experts, width) - routed + routed // experts * top_k


def model_headers(headers: CheckpointHeaders) -> ModelHeaders:
    """The planner's view of an inspected checkpoint.

    Raises:
        InputRejected: dense or unsupported model, or tensors that do not belong to its family.
    """
    family = student_family(headers.config)
    entries = family.tensors(headers.config, list(headers.tensors))
    spec = family.spec(headers.config)
    first_of = {layer: third[0] for third in layer_thirds(spec.layers) for layer in third}
    groups: Counter[_Key] = Counter()
    layers_of: dict[_Key, list[int]] = defaultdict(list)
    for entry in entries:
        part = entry.part if entry.tensor_class == "attention_other" else "weight"
        key = (entry.tensor_class, entry.shape, None if entry.layer is None else first_of[entry.layer], part)
        groups[key] += 1
        layers_of[key] += [] if entry.layer is None else [entry.layer]
    return ModelHeaders(
        spec=spec,
        groups=tuple(
            Group(name, shape, count, layer, part, tuple(layers_of[name, shape, layer, part]))
            for (name, shape, layer, part), count in groups.items()
        ),
        checkpoint_bytes=headers.total_bytes,
        tokenizer_bytes=tokenizer_bytes(headers.folder),
    )


def tokenizer_bytes(folder: Path) -> int:
    """Bytes of vocabulary, token types and merges as GGUF strings (length prefix 8); 0 without tokenizer.json.

    Raises:
        InputRejected: tokenizer.json is empty, binary, no object, or its parts are of another kind.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return 0
    content = read_json(path)
    try:
        model = content.get("model") or {}
        added = [token.get("content", "") for token in content.get("added_tokens") or []]
        tokens = {*_names(model.get("vocab") or {}), *added}
        merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model.get("merges") or []]
        return sum(len(text.encode()) + 8 for text in [*tokens, *merges]) + 4 * len(tokens)
    except (AttributeError, TypeError, IndexError) as error:
        raise InputRejected("the tokenizer cannot be read", where=str(path), why=str(error)) from error


def _names(vocab: dict[str, int] | list[list[object]]) -> list[str]:
    """Token strings of a BPE vocabulary (a mapping) or a unigram one (pairs)."""
    return list(vocab) if isinstance(vocab, dict) else [str(pair[0]) for pair in vocab]
