"""Several prompts decoded side by side by transformers, each drawing with its own random numbers.

`generate` of transformers does the padding, the positions and the caches of every architecture. Its own sampler is
replaced: one random state for the whole batch would make an answer depend on its neighbours.

Legend: B batch, S sequence, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor

from moe_edge.runtimes.base import Prompt
from moe_edge.runtimes.sampling import RowNoise, Sampling, pick

BATCH_TOKENS = 1024  # of rows that are read together, beside a batch that is decoded


class SeededPick(LogitsProcessor):
    """Draws every row's token and leaves only that one possible, so that the greedy search takes it."""

    def __init__(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        self._noise = [RowNoise(prompt.seed, prompt.row) for prompt in prompts]
        self._sampling = sampling

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        """Scores [B, V] with one zero per row and minus infinity elsewhere."""
        chosen_BV = torch.full_like(scores, -torch.inf)
        for row, logits_V in enumerate(scores.float().cpu().numpy()):
            chosen_BV[row, pick(logits_V, self._sampling, self._noise[row])] = 0.0
        return chosen_BV


@torch.inference_mode()
def generate_side_by_side(
    model: Any, prompts: Sequence[Prompt], max_new_tokens: int, stop_ids: Collection[int], sampling: Sampling
) -> list[list[int]]:
    """The continuation of every prompt, up to its first stop token; the same tokens as one prompt at a time.

    Raises:
        InputRejected: the logits of one row hold NaN or infinity.
    """
    if max_new_tokens < 1 or not prompts:
        return [[] for _ in prompts]
    width = max(len(prompt.ids) for prompt in prompts)
    ids_BS = np.zeros((len(prompts), width), dtype=np.int64)
    mask_BS = np.zeros_like(ids_BS)
    for row, prompt in enumerate(prompts):
        ids_BS[row, width - len(prompt.ids) :] = prompt.ids
        mask_BS[row, width - len(prompt.ids) :] = 1
    # A checkpoint's own penalties and temperatures have no say.
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    stops = sorted(stop_ids)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
    )
    out_BS = model.generate(
        input_ids=torch.from_numpy(ids_BS).to(model.device),
        attention_mask=torch.from_numpy(mask_BS).to(model.device),
        generation_config=settings,
        logits_processor=[SeededPick(prompts, sampling)],
    )
    return [_until_stop(row, stop_ids) for row in out_BS[:, width:].tolist()]


def _until_stop(tokens: list[int], stop_ids: Collection[int]) -> list[int]:
    """The tokens before the first stop token."""
    end = next((at for at, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[:end]


def batches_by_length(rows: Sequence[np.ndarray]) -> list[list[int]]:
    """The numbers of the rows that are read together: of one length, BATCH_TOKENS tokens at most or one row."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, ids_S in enumerate(rows):
        by_length[len(ids_S)].append(number)
    sized = [(max(1, BATCH_TOKENS // length), numbers) for length, numbers in by_length.items()]
    return [numbers[start : start + size] for size, numbers in sized for start in range(0, len(numbers), size)]
