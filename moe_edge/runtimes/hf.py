"""transformers behind the runtime interface: the float32 reference that every exported artifact is judged against.

Legend: S sequence, V vocabulary.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from moe_edge.contracts.errors import ConfigError, ResourceProblem
from moe_edge.contracts.units import format_bytes
from moe_edge.models.routing import watched_gaps
from moe_edge.models.students import is_mixture, load_student, use_fastest_experts
from moe_edge.process.placement import fits_in_memory, free_bytes, held_bytes
from moe_edge.runtimes.base import ClosingRuntime, Prompt, checked_tokens
from moe_edge.runtimes.hf_batch import batches_by_length, generate_side_by_side
from moe_edge.runtimes.sampling import Sampling
from moe_edge.storage.checkpoint import inspect_checkpoint

LOADABLE_SHARE = 0.9  # of the free memory: a model beyond it would be killed by the system, not refused


class HfRuntime(ClosingRuntime):
    """A checkpoint folder in float32 on the CPU, with a key-value cache for `prefill` and `step`.

    Args:
        path: the checkpoint folder.
        threads: torch threads while open (0 = leave as they are); closing restores the old number.
        context_length: tokens that fit into one context.

    Raises:
        ConfigError: no such folder.
        InputRejected: it cannot be loaded.
        ResourceProblem: it does not fit into memory.
    """

    name = "hf"

    def __init__(self, path: Path, threads: int, context_length: int) -> None:
        self.path, self.context_length = Path(path), context_length
        _refuse_too_large(self.path)
        self._model: PreTrainedModel | None = load_student(self.path)
        self.vocab: int = self._model.config.vocab_size
        self._cache: DynamicCache | None = None
        self._old_threads = torch.get_num_threads()
        if threads:
            torch.set_num_threads(threads)

    def logits(self, ids_S: np.ndarray) -> np.ndarray:
        """Logits [S, V] float32 of every position, from an empty context. Raises ConfigError when S is too long."""
        return self._forward(ids_S, None, last_only=False)

    @torch.inference_mode()
    def routing_gaps(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """How near each token's routing is to a tie: its smallest gap over all MoE layers (`models.routing.routing_gap`).

        Returns:
            [S] of each row; infinite where there are no routers.

        Raises:
            ConfigError: a row is empty, too long, or holds an unknown token.
        """
        model, mixture = self._open_model(), is_mixture(self._open_model())
        given = [checked_tokens(row, 0, self.context_length, self.vocab, self.path) for row in rows]
        found = [np.full(len(ids_S), np.inf, dtype=np.float32) for ids_S in given]
        for batch in batches_by_length(given) if mixture else ():
            ids_BS = torch.from_numpy(np.stack([given[row] for row in batch]))
            with watched_gaps(model) as gaps:
                model(input_ids=ids_BS, use_cache=False, logits_to_keep=1)
            gap_BS = torch.stack(gaps).amin(0).float().view(ids_BS.shape)
            for row, gap_S in zip(batch, gap_BS, strict=True):
                found[row] = gap_S.numpy()
        return found

    def prefill(self, ids_S: np.ndarray) -> np.ndarray:
        """Empty the context, read the prompt, return the last position's logits [V] float32."""
        self._cache = DynamicCache(config=self._open_model().config)
        return self._last_logits(ids_S, self._cache)

    def step(self, token: int) -> np.ndarray:
        """Append one token and return its logits [V] float32. Raises ConfigError before a prefill or when full."""
        if self._cache is None:
            raise ConfigError("step needs a prefill first")
        return self._last_logits(np.array([token]), self._cache)

    def generate_batch(
        self, prompts: Sequence[Prompt], max_new_tokens: int, stop_ids: Collection[int], sampling: Sampling
    ) -> list[list[int]]:
        """The continuations of all prompts side by side, from here on with the fastest experts kernel.

        Raises:
            ConfigError: a prompt is empty, does not fit into the context with its answer, or holds an unknown token.
        """
        model = self._open_model()
        for prompt in prompts:
            checked_tokens(prompt.ids, max_new_tokens, self.context_length, self.vocab, self.path)
        use_fastest_experts(model)
        return generate_side_by_side(model, prompts, max_new_tokens, stop_ids, sampling)

    def close(self) -> None:
        """Free the model and restore the thread count."""
        if self._model is not None:
            torch.set_num_threads(self._old_threads)
        self._model = self._cache = None

    def _open_model(self) -> PreTrainedModel:
        if self._model is None:
            raise ConfigError("the runtime is closed")
        return self._model

    def _last_logits(self, ids_S: np.ndarray, cache: DynamicCache) -> np.ndarray:
        last_V: np.ndarray = self._forward(ids_S, cache, last_only=True)[-1]
        return last_V

    @torch.inference_mode()
    def _forward(self, ids_S: np.ndarray, cache: DynamicCache | None, *, last_only: bool) -> np.ndarray:
        model = self._open_model()
        used = cache.get_seq_length() if cache is not None else 0
        ids_1S = torch.from_numpy(checked_tokens(ids_S, used, self.context_length, self.vocab, self.path))[None]
        kept = 1 if last_only else 0
        out = model(input_ids=ids_1S, past_key_values=cache, use_cache=cache is not None, logits_to_keep=kept)
        logits: np.ndarray = out.logits[0].numpy()
        return logits


def _refuse_too_large(path: Path) -> None:
    headers = inspect_checkpoint(path, require_tokenizer=False)
    if not fits_in_memory(headers, torch.float32, share=LOADABLE_SHARE):
        needed, free = held_bytes(headers, torch.float32), free_bytes()
        raise ResourceProblem(
            "not measured: the model does not fit into memory",
            where=str(path),
            why=f"it takes {format_bytes(needed)} in float32, {format_bytes(free)} are free",
            next_command="a machine with more memory; the exported files are measured without it",
        )
