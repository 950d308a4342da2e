"""How the next token is drawn from logits: the same mathematics, in float64, for every runtime.

What: `Sampling` (temperature, top-k, top-p; temperature 0 is greedy) and `pick`. Why not each runtime's own sampler: two
artifacts can be compared answer by answer only when both draw with the same random numbers, and nearly equal logits
must then give equal tokens. So every token of every answer has its own random number per vocabulary entry, fixed by
seed, row, position and entry (`RowNoise`), and the token is the winner of an exponential race, argmax p / noise: the
Gumbel-max trick (Maddison et al. 2014). Two distributions at total variation distance d then disagree with probability
at most 2 d / (1 + d). An answer depends neither on the batch it was in nor on what was answered before a kill.

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


class RowNoise:
    """The random numbers of one answer: one exponential variate per vocabulary entry, afresh for every token."""

    def __init__(self, seed: int, row: str) -> None:
        self._key = int(hashlib.sha256(f"{seed}:{row}".encode()).hexdigest()[:32], 16)
        self._position = 0

    def next(self, vocab: int) -> np.ndarray:
        """[V] float64 of the next token; a larger vocabulary only appends to it."""
        self._position += 1
        return np.random.default_rng([self._key, self._position]).standard_exponential(vocab)


def pick(logits_V: np.ndarray, sampling: Sampling, noise: RowNoise) -> int:
    """The next token: the argmax, or a draw.

    Raises:
        InputRejected: the largest logit is NaN or infinite, so there is no distribution.
    """
    best = float(np.max(logits_V))
    if not np.isfinite(best):
        raise InputRejected("the model's logits are not finite", why=f"the largest of a position is {best}")
    if sampling.greedy:
        return int(np.argmax(logits_V))
    scores_V = (np.asarray(logits_V, dtype=np.float64) - best) / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        scores_V = _truncated(scores_V, sampling)
    return int(np.argmax(scores_V - np.log(noise.next(len(scores_V)))))


def _truncated(scores_V: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Minus infinity outside top-k and top-p; the most likely token always stays."""
    order_V = np.argsort(-scores_V, kind="stable")
    kept = min(sampling.top_k or len(order_V), len(order_V))
    mass_V = np.cumsum(np.exp(scores_V[order_V[:kept]]))
    if sampling.top_p < 1:  # a token stays while the mass before it is below p
        kept = int(np.searchsorted(mass_V, sampling.top_p * mass_V[-1], side="left")) + 1
    result_V = np.full_like(scores_V, -np.inf)
    result_V[order_V[:kept]] = scores_V[order_V[:kept]]
    return result_V
