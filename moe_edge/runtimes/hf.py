"""transformers behind the runtime interface: the float32 reference that every exported artifact is judged against.

Legend: S sequence, V vocabulary.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache

from moe_edge.contracts.errors import ConfigError
from moe_edge.families.routing_gap import watched_gaps
from moe_edge.families.students import is_mixture, load_student, use_fastest_experts
from moe_edge.runtimes.base import ClosingRuntime, Prompt, checked_tokens
from moe_edge.runtimes.hf_batch import generate_side_by_side
from moe_edge.runtimes.sampling import Sampling


class HfRuntime(ClosingRuntime):
    """A checkpoint folder in float32 on the CPU, with a key-value cache for `prefill` and `step`.

    Args:
        path: the checkpoint folder.
        threads: torch threads while open (0 = leave as they are); closing restores the old number.
        context_length: tokens that fit into one context.

    Raises:
        ConfigError: no such folder.
        InputRejected: it cannot be loaded.
    """

    name = "hf"

    def __init__(self, path: Path, threads: int, context_length: int) -> None:
        self.path, self.context_length = Path(path), context_length
        self._model: torch.nn.Module | None = load_student(self.path)
        self.vocab: int = self._model.config.vocab_size
        self._cache: DynamicCache | None = None
        self._old_threads = torch.get_num_threads()
        if threads:
            torch.set_num_threads(threads)

    def logits(self, ids_S: np.ndarray) -> np.ndarray:
        """Logits [S, V] float32 of every position, from an empty context. Raises ConfigError when S is too long."""
        return self._forward(ids_S, None, last_only=False)

    def routing_gaps(self, ids_S: np.ndarray) -> np.ndarray:
        """Each token's smallest routing gap over all MoE layers, [S] (families/routing_gap.py); infinite without routers."""
        if not is_mixture(self._open_model()):
            return np.full(len(ids_S), np.inf, dtype=np.float32)
        with watched_gaps(self._open_model()) as gaps:
            self._forward(ids_S, None, last_only=True)
        smallest: np.ndarray = torch.stack(gaps).amin(0).numpy()
        return smallest

    def prefill(self, ids_S: np.ndarray) -> np.ndarray:
        """Empty the context, read the prompt, return the last position's logits [V] float32."""
        self._cache = DynamicCache(config=self._open_model().config)
        return self._forward(ids_S, self._cache, last_only=True)[-1]

    def step(self, token: int) -> np.ndarray:
        """Append one token and return its logits [V] float32. Raises ConfigError before a prefill or when full."""
        if self._cache is None:
            raise ConfigError("step needs a prefill first")
        return self._forward(np.array([token]), self._cache, last_only=True)[-1]

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

    def _open_model(self) -> torch.nn.Module:
        if self._model is None:
            raise ConfigError("the runtime is closed")
        return self._model

    @torch.inference_mode()
    def _forward(self, ids_S: np.ndarray, cache: DynamicCache | None, *, last_only: bool) -> np.ndarray:
        model = self._open_model()
        used = cache.get_seq_length() if cache is not None else 0
        ids_1S = torch.from_numpy(checked_tokens(ids_S, used, self.context_length, self.vocab, self.path))[None]
        kept = 1 if last_only else 0
        out = model(input_ids=ids_1S, past_key_values=cache, use_cache=cache is not None, logits_to_keep=kept)
        logits: np.ndarray = out.logits[0].numpy()
        return logits
