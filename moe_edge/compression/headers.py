"""What config.json and the safetensors headers alone say about a model: its spec and every tensor's class and shape.

Reading them takes a second at most and no weights, so a plan can be refused before hours are spent. Tensors of one
class and shape are counted together: a model has thousands of tensors and about fifteen different ones.

Shape suffixes: E experts, D model, V vocabulary.
"""

import json
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from moe_edge.contracts.spec import EXPERT_CLASSES, ModelSpec, TensorClass
from moe_edge.families import family_of
from moe_edge.storage.checkpoint import CheckpointHeaders

Shape = tuple[int, ...]
Group = tuple[TensorClass, Shape, int]  # class, shape of one tensor, how many of them
COUNTED_BY_EXPERTS: tuple[TensorClass, ...] = (*EXPERT_CLASSES, "router")


@dataclass(frozen=True)
class ModelHeaders:
    """A model as the planner sees it."""

    spec: ModelSpec
    groups: tuple[Group, ...]
    checkpoint_bytes: int  # of the teacher's tensors
    tokenizer_bytes: int  # what the vocabulary and merges take inside a GGUF

    def with_experts(self, experts: int) -> tuple[Group, ...]:
        """The same tensors after every layer keeps `experts` experts."""
        return tuple(
            (name, (experts, *shape[1:]) if name in COUNTED_BY_EXPERTS else shape, count)
            for name, shape, count in self.groups
        )

    def params_total(self, experts: int) -> int:
        """Parameters with `experts` experts per layer; a tied head is counted once."""
        return sum(count * prod(shape) for _, shape, count in self.with_experts(experts))

    def params_active(self, experts: int, top_k: int) -> int:
        """Parameters that one token uses: all but the experts it is not routed to."""
        routed = sum(count * prod(shape) for name, shape, count in self.with_experts(experts) if name in EXPERT_CLASSES)
        return self.params_total(experts) - routed + routed // experts * top_k


def model_headers(headers: CheckpointHeaders) -> ModelHeaders:
    """The planner's view of an inspected checkpoint.

    Raises:
        InputRejected: dense or unsupported model, or tensors that do not belong to its family.
    """
    family = family_of(headers.config)
    entries = family.tensors(headers.config, list(headers.tensors))
    groups = Counter((entry.tensor_class, entry.shape) for entry in entries)
    return ModelHeaders(
        spec=family.spec(headers.config),
        groups=tuple((name, shape, count) for (name, shape), count in groups.items()),
        checkpoint_bytes=headers.total_bytes,
        tokenizer_bytes=tokenizer_bytes(headers.folder),
    )


def tokenizer_bytes(folder: Path) -> int:
    """Bytes of vocabulary, token types and merges as GGUF strings (length prefix 8); 0 without tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return 0
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content.get("model", {})
    added = [token.get("content", "") for token in content.get("added_tokens", [])]
    tokens = {*_names(model.get("vocab", {})), *added}
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model.get("merges", [])]
    strings = [*tokens, *merges]
    return sum(len(text.encode()) + 8 for text in strings) + 4 * len(tokens)


def _names(vocab: dict[str, int] | list[list[object]]) -> list[str]:
    """Token strings of a BPE vocabulary (a mapping) or a unigram one (pairs)."""
    return list(vocab) if isinstance(vocab, dict) else [str(pair[0]) for pair in vocab]
