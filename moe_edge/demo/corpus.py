"""The demo corpus: chat records and plain text as one seeded, resumable token stream.

What: reads Dolly JSON lines and a WikiText file, renders and encodes them, and serves batches.
Why: a batch depends on nothing but (seed, step), so a resumed run sees exactly the same tokens as
an uninterrupted one, without a saved iterator state.
How: used by `moe_edge.demo.train` and `moe_edge.demo.evaluate`.

Shape suffixes: T tokens of the stream, R rows of a batch, L tokens of a row.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from moe_edge.demo.tokenizer import PAD_TOKEN

Message = dict[str, str]


def read_conversations(jsonl_path: Path) -> list[list[Message]]:
    """Each Dolly record as a user turn (instruction and optional input) and an assistant turn."""
    conversations = []
    for line in jsonl_path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            record = json.loads(line)
            user = record["instruction"]
            if record.get("input"):
                user = f"{user}\n\n{record['input']}"
            conversations.append(
                [
                    {"role": "user", "content": user},
                    {"role": "assistant", "content": record["output"]},
                ]
            )
    return conversations


def read_wikitext_sections(text_path: Path) -> list[str]:
    """A WikiText file cut at its heading lines (` = Title = `, ` = = Section = = `)."""
    sections: list[list[str]] = [[]]
    for line in text_path.read_text(encoding="utf-8").split("\n"):
        if line.startswith(" = ") and line.rstrip().endswith(" ="):
            sections.append([])
        if line.strip():
            sections[-1].append(line.strip())
    return ["\n".join(section) for section in sections if section]


def content_bytes(conversation: list[Message]) -> int:
    """UTF-8 bytes of what people wrote: no role names, no chat markers."""
    return sum(len(message["content"].encode("utf-8")) for message in conversation)


def render(tokenizer: PreTrainedTokenizerBase, conversation: list[Message]) -> str:
    """The conversation as the text the model is trained on."""
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert isinstance(text, str)
    return text


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[np.ndarray]:
    """Token ids of each text, closed by `<|endoftext|>`."""
    end_id = tokenizer.convert_tokens_to_ids(PAD_TOKEN)
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [np.array([*token_ids, end_id], dtype=np.int32) for token_ids in encoded]


@dataclass
class TokenStream:
    """Documents in a new seeded order each epoch, read as one endless row of tokens."""

    documents: list[np.ndarray]
    seed: int

    def __post_init__(self) -> None:
        self.epoch_tokens = sum(len(document) for document in self.documents)
        self._cache: dict[int, np.ndarray] = {}

    def _epoch(self, epoch: int) -> np.ndarray:
        """All tokens of one epoch; the two newest epochs are kept for the border batch."""
        if epoch not in self._cache:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))
            self._cache[epoch] = np.concatenate([self.documents[index] for index in order])
            self._cache = dict(sorted(self._cache.items())[-2:])
        return self._cache[epoch]

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from absolute position `start`, crossing epochs where needed."""
        pieces, position, missing = [], start, count
        while missing > 0:
            epoch, offset = divmod(position, self.epoch_tokens)
            piece = self._epoch(epoch)[offset : offset + missing]
            pieces.append(piece)
            position += len(piece)
            missing -= len(piece)
        return np.concatenate(pieces)

    def batch(self, step: int, batch_tokens: int, row_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and next-token labels of one step, each of shape R x L."""
        tokens_T = self.read(step * batch_tokens, batch_tokens + 1).astype(np.int64)
        input_RL = torch.from_numpy(tokens_T[:-1].reshape(-1, row_tokens))
        label_RL = torch.from_numpy(tokens_T[1:].reshape(-1, row_tokens))
        return input_RL, label_RL
