"""How the next token is drawn from logits: the same mathematics, in float64, for every runtime.

What: `Sampling` (temperature, top-k, top-p; temperature 0 is greedy) and `pick`. Why not each runtime's own sampler: two
artifacts can be compared answer by answer only when both draw with the same random numbers. Every row has its own
generator, seeded by the run's seed and the row (`row_generator`), so an answer does not depend on the batch it was in,
nor on what was answered before a kill.

Legend: V vocabulary.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from moe_edge.contracts.errors import ConfigError, InputRejected


@dataclass(frozen=True)
class Sampling:
    """What shapes the distribution a token is drawn from, applied in this order: temperature, top-k, top-p.

    Args:
        temperature: logits are divided by it; 0 = greedy.
        top_k: only the k most likely tokens; 0 = all.
        top_p: only the fewest tokens whose probabilities reach p (Holtzman et al. 2020); 1 = all.

    Raises:
        ConfigError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            why = "temperature and top-k are at least 0, top-p lies in (0, 1]"
            raise ConfigError(f"impossible sampling: {self}", why=why)

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature == 0


GREEDY = Sampling(temperature=0.0)


def row_generator(seed: int, row: str) -> np.random.Generator:
    """The random numbers of one row in one run."""
    return np.random.default_rng(int(hashlib.sha256(f"{seed}:{row}".encode()).hexdigest()[:32], 16))


def pick(logits_V: np.ndarray, sampling: Sampling, generator: np.random.Generator) -> int:
    """The next token: the argmax, or a draw by inverting the cumulative distribution (one random number per token).

    Raises:
        InputRejected: the largest logit is NaN or infinite, so there is no distribution.
    """
    best = float(np.max(logits_V))
    if not np.isfinite(best):
        raise InputRejected("the model's logits are not finite", why=f"the largest of a position is {best}")
    if sampling.greedy:
        return int(np.argmax(logits_V))
    weights_V = np.exp((np.asarray(logits_V, dtype=np.float64) - best) / sampling.temperature)
    if sampling.top_k or sampling.top_p < 1:
        weights_V = _truncated(weights_V, sampling)
    cumulative_V = np.cumsum(weights_V)
    token = int(np.searchsorted(cumulative_V, generator.random() * cumulative_V[-1], side="right"))
    return min(token, int(np.flatnonzero(weights_V)[-1]))  # rounding may carry the draw past the last likely token


def _truncated(weights_V: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The weights with everything outside top-k and top-p set to zero; the most likely token always stays."""
    order_V = np.argsort(-weights_V, kind="stable")
    kept = min(sampling.top_k or len(order_V), len(order_V))
    mass_V = np.cumsum(weights_V[order_V[:kept]])
    if sampling.top_p < 1:  # a token stays while the mass before it is below p
        kept = int(np.searchsorted(mass_V, sampling.top_p * mass_V[-1], side="left")) + 1
    result_V = np.zeros_like(weights_V)
    result_V[order_V[:kept]] = weights_V[order_V[:kept]]
    return result_V
