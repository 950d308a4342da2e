"""Rows that the student writes itself: a share of every step's micro-batches, judged by the live teacher (on-policy).

A pruned model that only ever continues good text never learns to leave its own mistakes; on its own rows the teacher
corrects exactly those (GKD, arXiv:2306.13649). Rollouts grow from short to long over a stage, because a student fresh from
pruning soon goes round in circles (arXiv:2607.13124): such an end is cut off, and a row that begins with its end is given back.

What is written depends on the seed, the step and the student's weights alone, so a resumed run writes the same rows and
there is no state to save; but where several steps train on one batch (knowledge augmentation by the paper's algorithm 1, which
draws y once and then updates M times), what the first of them wrote is kept for the others, and is in the checkpoint.
The random numbers of training are left alone.

Shape suffixes: B rows of a micro-batch, R rows of all chosen micro-batches, S tokens of a row, P tokens of a prompt, N
tokens that were written.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from transformers import GenerationConfig

from moe_edge.contracts.config import OnPolicyConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.terms import RecordsNothing
from moe_edge.formulas.divergence import IGNORED_LABEL
from moe_edge.metrics.text_answers import repeated_suffix

Batch = dict[str, Tensor]
COUNTERS = ("rollout_tokens", "rollout_empty", "rollout_repeated", "rollout_seconds")


@dataclass(frozen=True)
class UnpaddedRow:
    """A row without its padding."""

    ids_S: Tensor
    labels_S: Tensor  # IGNORED_LABEL where nothing is to be learnt


class Rollouts(RecordsNothing):
    """A BatchHook that replaces micro-batches by what the student writes, and the Observer that counts.

    A written micro-batch has input_ids, attention_mask, labels (ignored on prompts and padding, which is on the right) and the
    key "rollout", by which a loss knows that the labels are no one's text.

    Args:
        student: has `generate`; what a parallel backend does to it in place is fine, a wrapper around it is not meant.
        steps: of the whole stage; the length of rollouts grows over them.
        repeats: how many steps in a row get the same batches; they are rewritten at the first of these.

    Raises:
        ConfigError: rollouts without tokens.
    """

    def __init__(self, student: nn.Module, config: OnPolicyConfig, steps: int, seed: int, repeats: int = 1) -> None:
        if min(config.new_tokens) < 1:
            why = f"new_tokens is {list(config.new_tokens)}"
            raise ConfigError("a rollout needs a token at least", where="distill.stages: on_policy", why=why)
        self._student: Any = student  # transformers mixes `generate` into some classes, untyped
        self._config, self._steps, self._seed = config, steps, seed
        self.repeats = repeats
        self._group, self._kept = -1, dict[int, Batch]()  # which repeats these are, and what was written for them
        self._ends = end_tokens(student)
        self._pad = self._ends[0] if self._ends else 0
        self._counts = dict.fromkeys(COUNTERS, 0.0)

    def __call__(self, batches: list[Batch], step: int) -> list[Batch]:
        """The micro-batches of a step (counted from 0), some of them rewritten."""
        group = step // self.repeats
        if self.repeats == 1 or group != self._group:
            self._group, self._kept = group, self._rewritten(batches, group)
        return [self._kept.get(index, batch) for index, batch in enumerate(batches)]

    def _rewritten(self, batches: list[Batch], group: int) -> dict[int, Batch]:
        """{index: micro-batch} of those in which the student wrote something."""
        chosen, step = chosen_batches(len(batches), group, self._config.share, self._seed), group * self.repeats
        if not chosen:
            return {}
        started, result = time.monotonic(), {}
        originals = {index: rows_of(batches[index]) for index in chosen}
        given = [row for rows in originals.values() for row in rows]
        prompts = [row.ids_S[: prompt_length(row, self._config.prompt_tokens)] for row in given]
        made = iter([self._row(*parts) for parts in zip(given, prompts, self._write(prompts, step), strict=True)])
        for index, rows in originals.items():
            new_rows = list(islice(made, len(rows)))
            if any(new is not old for new, old in zip(new_rows, rows, strict=True)):
                result[index] = padded(new_rows, self._pad) | {"rollout": torch.tensor(1)}
        self._counts["rollout_seconds"] += time.monotonic() - started
        return result

    def state(self) -> dict[str, Tensor]:
        """What the steps that share a batch still need: which they are, and every tensor that was written for them."""
        kept = {f"{index}.{name}": tensor for index, batch in self._kept.items() for name, tensor in batch.items()}
        return {"group": torch.tensor(self._group)} | {name: tensor.cpu() for name, tensor in kept.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on as the run that `state` is of; raises KeyError where it is of something else."""
        self._group, self._kept = int(state["group"]), {}
        device = next(self._student.parameters()).device
        for key, tensor in state.items():
            if key != "group":
                index, _, name = key.partition(".")
                self._kept.setdefault(int(index), {})[name] = tensor.to(device)

    def read(self) -> dict[str, float]:
        """Tokens written, rows that came back empty, rows cut for repetition, seconds; since the last call."""
        counts, self._counts = self._counts, dict.fromkeys(COUNTERS, 0.0)
        return counts

    @torch.no_grad()
    def _write(self, prompts: Sequence[Tensor], step: int) -> list[Tensor]:
        """What the student writes after each prompt, up to and with the token that ends it."""
        device = next(self._student.parameters()).device
        longest = max(len(prompt_P) for prompt_P in prompts)
        ids_RP = torch.full((len(prompts), longest), self._pad, device=device)
        mask_RP = torch.zeros_like(ids_RP)
        for row, prompt_P in enumerate(prompts):  # generation wants its padding on the left
            ids_RP[row, longest - len(prompt_P) :], mask_RP[row, longest - len(prompt_P) :] = prompt_P.to(device), 1
        settings = self._settings(step)
        cuda = [device] if device.type == "cuda" else []
        with _writing(self._student, settings), torch.random.fork_rng(devices=cuda):
            torch.manual_seed(_seed_of(self._seed, step))
            with torch.autocast(device.type, torch.bfloat16, enabled=bool(cuda)):
                out_RS = self._student.generate(ids_RP, settings, attention_mask=mask_RP, synced_gpus=_several())
        return [until_end(new_N, self._ends).cpu() for new_N in out_RS[:, longest:]]

    def _settings(self, step: int) -> GenerationConfig:
        """Plain sampling from the student's distribution, nothing cut off."""
        return GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=True,
            temperature=self._config.temperature,
            top_p=1.0,
            top_k=0,
            max_new_tokens=new_tokens_at(step, self._steps, self._config.new_tokens),
            eos_token_id=self._ends or None,
            pad_token_id=self._pad,
            use_cache=True,
        )

    def _row(self, original: UnpaddedRow, prompt_P: Tensor, new_N: Tensor) -> UnpaddedRow:
        """The prompt and what follows it, without a repeated end; the original where nothing follows."""
        ended = len(new_N) > 0 and int(new_N[-1]) in self._ends
        text_N = new_N[:-1] if ended else new_N
        if not len(text_N):
            self._counts["rollout_empty"] += 1
            return original
        suffix = repeated_suffix(text_N.numpy())
        if suffix.share(len(text_N)) > self._config.max_repetition:
            self._counts["rollout_repeated"] += 1
            new_N = text_N[: len(text_N) - suffix.length]
        self._counts["rollout_tokens"] += len(new_N)
        new_N = new_N.to(prompt_P.device)
        return UnpaddedRow(torch.cat([prompt_P, new_N]), torch.cat([torch.full_like(prompt_P, IGNORED_LABEL), new_N]))


@contextmanager
def _writing(student: Any, settings: GenerationConfig) -> Iterator[None]:
    """The student in eval mode, and with no settings of its own, which would fill what ours leave open."""
    training, own = student.training, student.generation_config
    student.eval()
    student.generation_config = settings
    try:
        yield
    finally:
        student.generation_config = own
        student.train(training)


def chosen_batches(count: int, step: int, share: float, seed: int) -> list[int]:
    """Which of a step's micro-batches are rewritten: the share is met over the steps so far, rounded down."""
    due = math.floor((step + 1) * count * share + 1e-9) - math.floor(step * count * share + 1e-9)
    return sorted(np.random.default_rng([seed, step]).choice(count, due, replace=False).tolist())


def new_tokens_at(step: int, steps: int, span: tuple[int, int]) -> int:
    """Tokens to write at a step counted from 0: linear from the first number at the first step to the second at the last."""
    first, last = span
    return round(first + (last - first) * min(1.0, step / max(1, steps - 1)))


def prompt_length(row: UnpaddedRow, prompt_tokens: int) -> int:
    """How much of a row the student is given: what stands before its first label where rows mark that, else a fixed length."""
    labelled = (row.labels_S != IGNORED_LABEL).nonzero()
    before = int(labelled[0]) if len(labelled) else 0
    return before if before > 1 else min(prompt_tokens, len(row.ids_S))


def until_end(new_N: Tensor, ends: Sequence[int]) -> Tensor:
    """Everything up to and with the first token that ends a text."""
    hits = torch.isin(new_N, torch.tensor(ends, dtype=new_N.dtype, device=new_N.device)).nonzero()
    return new_N[: int(hits[0]) + 1] if len(hits) else new_N


def end_tokens(model: nn.Module) -> list[int]:
    """The ids that end a text, as the model's generation settings or its configuration name them."""
    for settings in (model.generation_config, model.config):
        ends = getattr(settings, "eos_token_id", None)
        if ends is not None:
            return [ends] if isinstance(ends, int) else list(ends)
    return []


def rows_of(batch: Batch) -> list[UnpaddedRow]:
    """The rows of a micro-batch without their padding."""
    ids_BS, mask_BS = batch["input_ids"], batch.get("attention_mask")
    lengths = [ids_BS.shape[1]] * len(ids_BS) if mask_BS is None else mask_BS.sum(-1).tolist()
    columns = zip(ids_BS, batch["labels"], lengths, strict=True)
    return [UnpaddedRow(ids_S[:length], labels_S[:length]) for ids_S, labels_S, length in columns]


def padded(rows: Sequence[UnpaddedRow], pad: int) -> Batch:
    """A micro-batch of rows, padded on the right."""
    sequences = ([row.ids_S for row in rows], [row.labels_S for row in rows], [torch.ones_like(r.ids_S) for r in rows])
    names = ("input_ids", "labels", "attention_mask")
    fills = (pad, IGNORED_LABEL, 0)
    return {
        name: nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)
        for name, parts, fill in zip(names, sequences, fills, strict=True)
    }


def _several() -> bool:
    """Do several processes train together? Then all of them go on until the last one's text ends, because weights that are
    sharded are gathered by all at once."""
    return distributed.is_initialized() and distributed.get_world_size() > 1


def _seed_of(seed: int, step: int) -> int:
    """Every process draws for itself."""
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
