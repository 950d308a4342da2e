"""Measure a teacher on held-out conversations: bits per byte and the share of each expert.

What: bits per byte of a chat model on Dolly records it never trained on, plus the routed share of
every expert in every layer.
Why bits per byte: unlike perplexity it does not depend on the tokenizer.
How: `python -m moe_edge.demo.evaluate --teacher run/teacher --dolly-dev dolly/dev.jsonl`

Definition: the bits of all tokens of the rendered conversation (chat markers and role names
included, so the number is never flattered), over the UTF-8 bytes of the content alone
(instruction, input and output; no markers). The very first token has no context and is not scored;
it is always `<|im_start|>`. A conversation longer than the context is cut, and then only the
content bytes of the kept text count. Batch padding is scored nowhere.

Shape suffixes: R rows of a batch, L tokens of a row, T tokens, E experts.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen3MoeForCausalLM,
)

from moe_edge.demo.corpus import Message, read_conversations, render
from moe_edge.demo.model import expert_counts


@dataclass
class RenderedRow:
    """One rendered conversation, cut to the context: its tokens and the content bytes kept."""

    token_ids: list[int]
    scored_bytes: int
    was_cut: bool


@dataclass
class HeldOutScore:
    """What was measured; `expert_shares[layer][expert]` sums to 1 in each layer."""

    bits_per_byte: float
    nats_per_token: float
    conversations: int
    cut_conversations: int
    scored_tokens: int
    scored_bytes: int
    context_tokens: int
    expert_shares: list[list[float]]

    def to_json(self) -> str:
        """The record as indented JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"


def content_spans(conversation: list[Message], text: str) -> list[tuple[int, int]]:
    """Character ranges of the contents inside the rendered text, in turn order."""
    spans, position = [], 0
    for message in conversation:
        header = message["role"] + "\n"
        start = text.index(header, position) + len(header)
        position = start + len(message["content"])
        spans.append((start, position))
    return spans


def make_row(tokenizer: PreTrainedTokenizerBase, conversation: list[Message], context_tokens: int) -> RenderedRow:
    """Render, encode and cut; the kept bytes are those before the last kept token's end."""
    text = render(tokenizer, conversation)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    token_ids = encoded["input_ids"][:context_tokens]
    kept_end = encoded["offset_mapping"][len(token_ids) - 1][1]
    scored_bytes = sum(
        len(text[start : min(end, kept_end)].encode("utf-8"))
        for start, end in content_spans(conversation, text)
        if start < kept_end
    )
    return RenderedRow(token_ids, scored_bytes, len(token_ids) < len(encoded["input_ids"]))


def padded_batches(
    rows: list[RenderedRow], pad_id: int, batch_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and 0/1 mask of shape R x L; rows of similar length share a batch, right-padded."""
    waiting: list[list[int]] = []
    for token_ids in sorted((row.token_ids for row in rows), key=len):
        if waiting and (len(waiting) + 1) * len(token_ids) > batch_tokens:
            yield pad_rows(waiting, pad_id)
            waiting = []
        waiting.append(token_ids)
    if waiting:
        yield pad_rows(waiting, pad_id)


def pad_rows(rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad to the longest row."""
    longest = max(len(row) for row in rows)
    ids_RL = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])
    mask_RL = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids_RL, mask_RL


@torch.inference_mode()
def score_batch(model: Qwen3MoeForCausalLM, ids_RL: torch.Tensor, mask_RL: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Summed nats of all real tokens after the first, and routed slots per layer and expert."""
    # Right padding under a causal mask changes no real token, so no attention mask is passed.
    outputs = model(input_ids=ids_RL, output_router_logits=True, use_cache=False)
    nats_T = functional.cross_entropy(
        outputs.logits[:, :-1].float().flatten(0, 1), ids_RL[:, 1:].flatten(), reduction="none"
    )
    nats = (nats_T.double() * mask_RL[:, 1:].flatten()).sum().item()
    real_T = mask_RL.flatten().bool()
    top_k = model.config.num_experts_per_tok
    counts = [
        expert_counts(logits_TE.reshape(real_T.numel(), -1)[real_T].float(), top_k)
        for logits_TE in outputs.router_logits
    ]
    return nats, torch.stack(counts)


def evaluate(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[Message]],
    batch_tokens: int = 4096,
) -> HeldOutScore:
    """Score every conversation at the model's own context length."""
    model.eval()  # type: ignore[no-untyped-call]  # transformers
    context_tokens = model.config.max_position_embeddings
    rows = [make_row(tokenizer, conversation, context_tokens) for conversation in conversations]
    nats, counts_LE = 0.0, torch.zeros(1)
    for ids_RL, mask_RL in padded_batches(rows, tokenizer.pad_token_id, batch_tokens):
        batch_nats, batch_counts_LE = score_batch(model, ids_RL, mask_RL)
        nats += batch_nats
        counts_LE = counts_LE + batch_counts_LE
    shares_LE = counts_LE / counts_LE.sum(dim=-1, keepdim=True)
    scored_tokens = sum(len(row.token_ids) - 1 for row in rows)
    scored_bytes = sum(row.scored_bytes for row in rows)
    return HeldOutScore(
        bits_per_byte=nats / math.log(2) / scored_bytes,
        nats_per_token=nats / scored_tokens,
        conversations=len(rows),
        cut_conversations=sum(row.was_cut for row in rows),
        scored_tokens=scored_tokens,
        scored_bytes=scored_bytes,
        context_tokens=context_tokens,
        expert_shares=[[round(share, 5) for share in layer] for layer in shares_LE.tolist()],
    )


def load_teacher(
    folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerBase]:
    """The model (its shipped bfloat16 values, computed in `dtype`) and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer  # type: ignore[no-untyped-call]  # transformers


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m moe_edge.demo.evaluate`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--dolly-dev", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=None, help="only the first N records")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json-out", type=Path, default=None)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model, tokenizer = load_teacher(args.teacher)
    result = evaluate(model, tokenizer, read_conversations(args.dolly_dev)[: args.limit])
    if args.json_out:
        args.json_out.write_text(result.to_json(), encoding="utf-8")
    print(result.to_json())


if __name__ == "__main__":
    main()
