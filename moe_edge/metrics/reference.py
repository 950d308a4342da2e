"""Reference logits computed once, spilled to disk, and compared row by row with every artifact.

Teacher, student and artifact never share the memory: each is opened, read over all rows, and closed before the next.
Legend: N rows, S sequence, V vocabulary.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moe_edge.contracts.errors import ResourceProblem
from moe_edge.contracts.units import format_bytes
from moe_edge.metrics.quality import QualityJudge, Score
from moe_edge.process.progress import track
from moe_edge.runtimes.base import LogitModel, Runtime


def spill_logits(runtime: LogitModel, rows_NS: np.ndarray, path: Path, label: str) -> np.ndarray:
    """Write the logits of every row to a raw float32 file and map it read-only.

    Args:
        runtime: open; the caller closes it.
        rows_NS: token ids.
        path: the scratch file to create or overwrite.
        label: for the progress bar.

    Returns:
        float32 memory map [N, S, V].

    Raises:
        ResourceProblem: the disk cannot hold the file.
    """
    shape = (*rows_NS.shape, runtime.vocab)
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_disk(path.parent, int(np.prod(shape, dtype=np.int64)) * 4)
    spilled_NSV = np.memmap(path, dtype=np.float32, mode="w+", shape=shape)
    for row, ids_S in enumerate(track(rows_NS, label, total=len(rows_NS))):
        spilled_NSV[row] = runtime.logits(ids_S)
    spilled_NSV.flush()
    return np.memmap(path, dtype=np.float32, mode="r", shape=shape)


def _check_disk(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise ResourceProblem(
            f"the reference logits need {format_bytes(needed_bytes)}, the disk has {format_bytes(free_bytes)}",
            where=str(folder),
            next_command="free some space, or lower validate.tokens (--set validate.tokens=1024)",
        )


def judge_runtime(
    runtime: Runtime, rows_NS: np.ndarray, references: Mapping[str, np.ndarray], label: str
) -> dict[str, Score]:
    """Score an open runtime against each reference [N, S, V] in one pass over the rows."""
    judges = {name: QualityJudge() for name in references}
    for row, ids_S in enumerate(track(rows_NS, label, total=len(rows_NS))):
        logits_SV = runtime.logits(ids_S)
        for name, judge in judges.items():
            judge.add(references[name][row], logits_SV, ids_S)
    return {name: judge.result() for name, judge in judges.items()}


def judge_spilled(artifact_NSV: np.ndarray, rows_NS: np.ndarray, reference_NSV: np.ndarray) -> Score:
    """Score logits that are already on disk (the student against the teacher)."""
    judge = QualityJudge()
    for artifact_SV, ids_S, reference_SV in zip(artifact_NSV, rows_NS, reference_NSV, strict=True):
        judge.add(reference_SV, artifact_SV, ids_S)
    return judge.result()
