"""What quantizing one class of tensors costs a model, measured on it: KL(teacher || teacher with that class quantized).

One class at a time is replaced by what it would be after being stored as a GGUF type and read again (ggml's own code,
with the profile's imatrix), a few calibration rows are run, and the weights are put back bit by bit. The thirds of the
layers are told apart at the coarsest type; their shares hold for the others. Levels that a row length turns into the
same real types are run once.

Shape suffixes: N rows of tokens, S tokens of a row, V vocabulary, E experts, R rows of a matrix, C its columns.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.quantization import CODEBOOK_CLASSES, CODEBOOK_LEVELS, LEVELS, layer_thirds, type_for_row
from moe_edge.formulas.importance import mean_squares
from moe_edge.models.taps import decoder_layers
from moe_edge.models.weights import WeightRows, weight_rows
from moe_edge.planning.bits import NOISE, Sensitivity, along_noise
from moe_edge.planning.scoring import first_rows, row_kl
from moe_edge.process.limits import available_cores
from moe_edge.process.progress import track
from moe_edge.runtimes.ggml_quants import dequantize_rows, quantize_rows

MEASURED_LEVELS = ("Q2_K", "Q4_K", "Q6_K")  # the others follow by their noise
# Q2_K costs up to twice what its noise says beside a codebook type, Q3_K a third more: where both may be chosen, neither
# can be told from the other (measured on the demo teacher).
MEASURED_CODEBOOK_LEVELS = ("IQ2_S", "Q3_K", "Q4_K", "Q6_K")
# Where rows are no multiple of 256 it becomes Q5_1, which has a minimum per block beside the scale: weights that once lay on
# such a grid (a dequantized checkpoint) lose almost nothing in it, and no noise on plain numbers tells so. A 135 M model's
# attention: .0017 nats in Q5_1, .031 in Q5_0, which stands for Q4_K, .006 in Q8_0.
MEASURED_FALLBACK = "Q5_K"
TOGETHER = "Q4_K"  # at which all classes are also quantized at once
DENSE_COUNT, EXPERT_COUNT = "dense_count", "expert_count"

Stored = list[np.ndarray]  # one array of bytes per matrix (E of them for experts)


def sensitivity_of(
    config: BuildConfig, model: PreTrainedModel | None, ids_NS: Tensor, imatrix: Mapping[str, Tensor] | None
) -> Sensitivity | None:
    """Measured on the teacher; None where that is switched off or the teacher does not fit in memory: priors then.

    Args:
        ids_NS: rows, of which the first few are used (plan.sensitivity_tokens).
        imatrix: the profile's sums of squares.
    """
    tokens = config.plan.sensitivity_tokens
    if not tokens or model is None:
        return None
    return measure_sensitivity(model, first_rows(ids_NS, tokens), imatrix, codebooks=codebooks_suit(config))


def codebooks_suit(config: BuildConfig) -> bool:
    """May the experts get codebook types: is their importance the student's, and does nobody demand a speed of a CPU?

    The roofline does not know that a CPU is slower with them: experts in IQ2_S decoded at half the speed of Q2_K, in
    IQ3_XXS and IQ4_XS at three quarters of Q3_K and Q4_K (one x86 core, 100 M parameters).
    """
    on_cpu = config.target.runtime.gpu_layers == 0
    return config.plan.action in ("drop", "merge") and not (on_cpu and config.target.budget.decode_tokens_per_s)


def measure_sensitivity(
    model: PreTrainedModel,
    ids_NS: Tensor,
    imatrix: Mapping[str, Tensor] | None = None,
    threads: int | None = None,
    codebooks: bool = True,
) -> Sensitivity:
    """KL of every class and third at every level; the model is as before on return.

    Noise of different classes does not add up in full (a token can be routed wrongly only once), so all classes are
    also quantized together at one level, and every KL is scaled by what that shows.

    Args:
        ids_NS: token ids.
        imatrix: `Statistics.imatrix` of this model; None = unweighted.
        threads: of the quantizer; None = all cores. Results do not depend on it.
        codebooks: may codebook types be chosen where the imatrix says what they need?
    """
    probe = QuantizationProbe(model, ids_NS, imatrix, threads or available_cores())
    thirds = layer_thirds(len(decoder_layers(model)))
    by_class: dict[str, list[WeightRows]] = {}
    for matrix in weight_rows(model):
        by_class.setdefault(matrix.bit_class, []).append(matrix)
    with_codebooks = {name for name in CODEBOOK_CLASSES if codebooks and _is_known(by_class.get(name, ()), imatrix)}
    jobs = [
        (name, level)
        for name, matrices in by_class.items()
        for level in _distinct(matrices, _levels_to_measure(matrices, name in with_codebooks))
    ]
    totals: dict[str, dict[str, float]] = {name: {} for name in by_class}
    shares: dict[str, list[float]] = {}
    together: dict[str, list[Stored]] = {}
    for name, level in track(jobs, "quantization sensitivity"):
        matrices = by_class[name]
        stored = probe.store(matrices, level)
        totals[name][level] = probe.kl(matrices, stored, level)
        if name not in shares:  # the first level is the coarsest, where the thirds differ most clearly
            alone = name == "embedding_head" or len(thirds) == 1
            shares[name] = [1.0] if alone else probe.shares(matrices, stored, level, thirds)
        if level == TOGETHER:
            together[name] = stored
    overlap = probe.overlap(by_class, together, totals)
    nats = {}
    for name, measured in totals.items():
        offered = (*CODEBOOK_LEVELS, *LEVELS) if name in with_codebooks else LEVELS
        filled = _filled(by_class[name], measured, offered)
        for third, share in enumerate(shares[name]):
            nats[name, third] = {level: share * overlap * value for level, value in filled.items()}
    return Sensitivity(nats, "measured", ids_NS.numel())


@dataclass
class QuantizationProbe:
    """A teacher, a few rows, and its own logits on them."""

    model: PreTrainedModel
    ids_NS: Tensor
    imatrix: Mapping[str, Tensor] | None
    threads: int

    def __post_init__(self) -> None:
        self.reference = list(_logits(self.model, self.ids_NS))

    def store(self, matrices: Sequence[WeightRows], level: str) -> list[Stored]:
        """What every matrix is stored as at a level."""
        return [self._store(matrix, type_for_row(level, matrix.rows.shape[-1])) for matrix in matrices]

    def _store(self, matrix: WeightRows, kind: str) -> Stored:
        found_EC = importance_of(matrix, self.imatrix)
        importance = repeat(None) if found_EC is None else found_EC.numpy()
        stack = zip(_stack(matrix.rows), importance, strict=False)
        return [quantize_rows(kind, rows_RC.float().cpu().numpy(), row_C, self.threads) for rows_RC, row_C in stack]

    @property
    def rows_for_shares(self) -> int:
        """Half of the rows: shares need less precision than totals."""
        return -(-len(self.ids_NS) // 2)

    def kl(
        self, matrices: Sequence[WeightRows], stored: Sequence[Stored], level: str, rows: int | None = None
    ) -> float:
        """Mean KL per token (of the first `rows` rows) while `matrices` hold what `stored` reads back as."""
        with _replaced(matrices, stored, level, self.threads):
            after = _logits(self.model, self.ids_NS[:rows])
            parts = [row_kl(before, changed) for before, changed in zip(self.reference, after, strict=False)]
        return max(float(torch.cat(parts).mean()), 0.0)

    def overlap(
        self,
        by_class: Mapping[str, Sequence[WeightRows]],
        together: Mapping[str, Sequence[Stored]],
        totals: Mapping[str, Mapping[str, float]],
    ) -> float:
        """KL of all classes at once over the sum of their KLs, at most 1 (where rows have no blocks, 1)."""
        separate = sum(totals[name][TOGETHER] for name in together)
        if not separate:
            return 1.0
        matrices = [matrix for name in together for matrix in by_class[name]]
        stored = [arrays for name in together for arrays in together[name]]
        return min(1.0, self.kl(matrices, stored, TOGETHER) / separate)

    def shares(
        self, matrices: Sequence[WeightRows], stored: Sequence[Stored], level: str, thirds: Sequence[range]
    ) -> list[float]:
        """Which part of a class's KL each third of the layers causes, when quantized alone; the parts add up to 1."""
        nats = []
        for third in thirds:
            chosen = [place for place, matrix in enumerate(matrices) if matrix.layer in third]
            part, bytes_of = [matrices[place] for place in chosen], [stored[place] for place in chosen]
            nats.append(self.kl(part, bytes_of, level, self.rows_for_shares) if part else 0.0)
        total = sum(nats)
        return [value / total for value in nats] if total > 0 else [1 / len(nats)] * len(nats)


def _levels_to_measure(matrices: Sequence[WeightRows], codebooks: bool) -> list[str]:
    """Coarsest first."""
    levels = list(MEASURED_CODEBOOK_LEVELS if codebooks else MEASURED_LEVELS)
    if set(_real(matrices, MEASURED_FALLBACK)) != {MEASURED_FALLBACK}:
        levels.insert(levels.index(TOGETHER) + 1, MEASURED_FALLBACK)
    return levels


def _real(matrices: Sequence[WeightRows], level: str) -> tuple[str, ...]:
    """The types that a level becomes for these rows."""
    return tuple(type_for_row(level, matrix.rows.shape[-1]) for matrix in matrices)


def _is_known(matrices: Sequence[WeightRows], imatrix: Mapping[str, Tensor] | None) -> bool:
    """Is there a matrix, and the importance of every matrix's columns?"""
    return bool(matrices) and all(importance_of(matrix, imatrix) is not None for matrix in matrices)


def _distinct(matrices: Sequence[WeightRows], levels: Sequence[str]) -> list[str]:
    """The measured levels that differ in their real types, coarsest first; TOGETHER is always one of them."""
    found: dict[tuple[str, ...], str] = {}
    for level in levels:
        real = _real(matrices, level)
        if real not in found or level == TOGETHER:
            found[real] = level
    return list(found.values())


def _filled(matrices: Sequence[WeightRows], measured: Mapping[str, float], levels: Sequence[str]) -> dict[str, float]:
    """All levels from the measured ones, by the noise of the types that the rows really get."""
    sizes = [matrix.rows.numel() for matrix in matrices]

    def noise(level: str) -> float:
        kinds = zip(sizes, _real(matrices, level), strict=True)
        return sum(size * NOISE[kind] for size, kind in kinds) / sum(sizes)

    known = {noise(level): nats for level, nats in measured.items()}
    return {level: along_noise(known, noise(level)) for level in levels}


def _stack(rows: Tensor) -> Tensor:
    return rows if rows.dim() == 3 else rows[None]


def importance_of(matrix: WeightRows, imatrix: Mapping[str, Tensor] | None) -> Tensor | None:
    """Mean squares [E or 1, C] float32 of a matrix's input columns; None where the profile says nothing about them."""
    if imatrix is None or matrix.imatrix is None or matrix.imatrix not in imatrix:
        return None
    sums, experts = imatrix[matrix.imatrix], matrix.rows.dim() == 3
    if matrix.imatrix != "head_in":
        sums = sums[matrix.position if experts else matrix.layer]
    counts = imatrix[EXPERT_COUNT][matrix.position] if experts else imatrix[DENSE_COUNT]
    found_EC = mean_squares(sums.double().reshape(-1, sums.shape[-1]), counts.double().reshape(-1))
    expected = (matrix.rows.shape[0] if experts else 1, matrix.rows.shape[-1])
    return found_EC if tuple(found_EC.shape) == expected else None


@contextmanager
def _replaced(matrices: Sequence[WeightRows], stored: Sequence[Stored], level: str, threads: int) -> Iterator[None]:
    originals = [matrix.rows.clone() for matrix in matrices]
    try:
        for matrix, arrays in zip(matrices, stored, strict=True):
            length = matrix.rows.shape[-1]
            kind = type_for_row(level, length)
            for rows_RC, stored_RB in zip(_stack(matrix.rows), arrays, strict=True):
                rows_RC.copy_(torch.from_numpy(dequantize_rows(kind, stored_RB, length, threads)))
        yield
    finally:
        for matrix, original in zip(matrices, originals, strict=True):
            matrix.rows.copy_(original)


@torch.no_grad()
def _logits(model: PreTrainedModel, ids_NS: Tensor) -> Iterator[Tensor]:
    """Logits [1, S, V] float32 of each row."""
    for ids_S in ids_NS.long():
        yield model(input_ids=ids_S[None].to(model.device), use_cache=False).logits.float()
