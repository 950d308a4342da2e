"""Golden prompts: a few token rows with what the teacher says about each next token, and how near each artifact came here.

They travel in the device bundle, so that a phone or a board can show that it computes the same model without the teacher.
The teacher's part is its top-k log-probabilities and the log mass of everything else: from the profile's logit cache, or,
where a plain checkpoint is exported, from that checkpoint itself.

S tokens of a prompt, K kept ids, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_edge.contracts.artifacts import ExportFolder
from moe_edge.exporting.device_runner import score
from moe_edge.formulas.divergence import teacher_topk
from moe_edge.runtimes.base import LogitModel, Runtime
from moe_edge.storage.logit_codec import TeacherRow
from moe_edge.storage.logits import LogitCache
from moe_edge.storage.rows import TokenRows

GOLDEN, GOLDEN_SCHEMA = ExportFolder.GOLDEN, "moe-edge/golden@1"  # in the export's folder and in every bundle
PROMPTS, PROMPT_TOKENS, KEPT_IDS = 4, 48, 32
DIGITS = 6  # of a log-probability: well below what any runtime reproduces
# Another machine's kernels round otherwise, above all in quantized products; a wrong file is nats away.
LIMIT_FACTOR, LIMIT_FLOOR_NATS = 1.5, 0.02

Prompt = dict[str, Any]  # ids [S], top_ids [S][K], top_logprobs [S][K], tail_logmass [S] with null for no mass


def _prompt(
    ids_S: Sequence[int] | np.ndarray, top_SK: np.ndarray, logprobs_SK: np.ndarray, tail_S: np.ndarray
) -> Prompt:
    return {
        "ids": [int(token) for token in ids_S],
        "top_ids": np.asarray(top_SK).tolist(),
        "top_logprobs": np.round(np.asarray(logprobs_SK, np.float64), DIGITS).tolist(),
        "tail_logmass": [round(float(value), DIGITS) if np.isfinite(value) else None for value in tail_S],
    }


def from_cache(logits: Path, rows: Path) -> list[Prompt]:
    """The beginnings of a few calibration rows, evenly spread, with the teacher's cached answers.

    Raises:
        InputRejected: a file is damaged, or the cache does not hold the rows.
    """
    ids_NS = TokenRows.load(rows).ids_NS
    chosen = np.unique(np.linspace(0, len(ids_NS) - 1, PROMPTS).round().astype(int))
    found = []
    with LogitCache(logits) as cache:
        plain = cache.temperatures.index(1.0)
        for row in chosen:
            teacher, part = cache.row(ids_NS[row]), slice(PROMPT_TOKENS)
            assert isinstance(teacher, TeacherRow)  # a profile keeps the largest ids, never drawn ones
            tail_S = teacher.tail_logmass_SH[part, plain]
            found.append(_prompt(ids_NS[row][part], teacher.indices_SK[part], teacher.logprobs_SK[part], tail_S))
    return found


def pieces(ids_S: np.ndarray) -> list[np.ndarray]:
    """The rows that `from_model` asks the model about."""
    return [ids_S[start : start + PROMPT_TOKENS] for start in range(0, len(ids_S), PROMPT_TOKENS)][:PROMPTS]


def from_model(model: LogitModel, ids_S: np.ndarray) -> list[Prompt]:
    """A text cut into prompts, with an open model's own answers."""
    found = []
    for piece_S in pieces(ids_S):
        logits_SV = torch.from_numpy(np.ascontiguousarray(model.logits(piece_S)))
        top = teacher_topk(logits_SV, KEPT_IDS, (1.0,), model.vocab)
        found.append(
            _prompt(piece_S, top.indices_TK.numpy(), top.logprobs_TK.numpy(), top.tail_logmass_TH[:, 0].numpy())
        )
    return found


def expected_score(prompts: Sequence[Prompt], artifact: Runtime) -> dict[str, Any]:
    """What the build host measures on the prompts with an open artifact; three digits, so that thread counts do not show."""
    measured = score(prompts, lambda ids: artifact.logits(np.asarray(ids, dtype=np.int64)))
    return {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in measured.items()}


def golden_of(golden: Mapping[str, Any], delivered: str) -> dict[str, Any]:
    """golden.json of one bundle: the prompts, and what this artifact scored where it was built."""
    expected = golden["expected"][delivered]
    limit = float(f"{LIMIT_FACTOR * expected['kl_nats'] + LIMIT_FLOOR_NATS:.3g}")
    kept = {name: golden[name] for name in ("schema", "teacher", "prompts")}
    return kept | {"expected": expected, "limit_kl_nats": limit}
