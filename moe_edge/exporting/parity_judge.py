"""The export's judge: every file reopened in its runtime and compared with the student, and the formats with each other.

One model is in memory at a time beside the stored logits of the fixed text: first each file continues the prompt greedily,
then the student reads everything in one pass (layer by layer where it does not fit), then each file is compared. The same
open runtimes score the golden prompts of the device bundles.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_edge.exporting import golden, parity
from moe_edge.exporting.job import ExportedFile, ExportJob
from moe_edge.exporting.parity_rows import GREEDY_TOKENS, Reference, Text, reference, text_of
from moe_edge.exporting.tokenizer_parity import check_tokenizer
from moe_edge.models.loading import load_tokenizer
from moe_edge.runtimes import open_runtime
from moe_edge.runtimes.base import Runtime, generate
from moe_edge.runtimes.hf_streamed import open_student
from moe_edge.storage.files import write_json_atomic

log = logging.getLogger(__name__)
PARITY_TOKENS = 256
Continuations = dict[str, tuple[int, ...]]  # a file's kind -> its greedy tokens after the prompt


@dataclass(frozen=True)
class ParityJudge:
    """What is the same for all files of an export."""

    model: Path
    family: str
    threads: int
    context_length: int  # of the student

    @property
    def length(self) -> int:
        """Of the contexts that are opened."""
        return min(self.context_length, 2 * PARITY_TOKENS)

    def open(self, file: ExportedFile) -> Runtime:
        """The file in its runtime; a full-precision GGUF with a float32 cache, since the conversion is judged."""
        exact = file.runtime == "llama_cpp" and parity.limits_of(file.kind, self.family)[0] is not None
        options = {"kv_float32": True} if exact else {}
        return open_runtime(file.runtime, file.path, self.threads, self.length, **options)

    def continuation(self, file: ExportedFile, text: Text) -> tuple[int, ...]:
        """The file's greedy tokens after the prompt."""
        with self.open(file) as artifact:
            return tuple(generate(artifact, text.prompt_ids, GREEDY_TOKENS))

    def row(
        self,
        file: ExportedFile,
        artifact: Runtime,
        expected: Reference,
        continuation: Sequence[int],
        logits_SV: np.ndarray,
    ) -> dict[str, Any]:
        """The row of an open file. Raises GateFailed where it is a full-precision one, and not the student."""
        limits, _ = parity.limits_of(file.kind, self.family)
        measured = parity.compare(expected, artifact, continuation, limits, logits_SV)
        return parity.require(file.kind, measured, self.family)


@dataclass(frozen=True)
class ParityVerdict:
    """The rows of parity.json and the content of golden.json."""

    rows: list[dict[str, Any]]
    golden: dict[str, Any]


def judge_files(job: ExportJob, files: Sequence[ExportedFile]) -> list[dict[str, Any]]:
    """Compare every file with the student; writes parity.json and the golden prompts of the device bundles.

    Returns:
        The rows of parity.json.

    Raises:
        GateFailed: a full-precision file is not the student, two formats disagree, or a tokenizer differs.
    """
    judge = ParityJudge(job.model, job.spec.family, job.threads, job.spec.context_length)
    verdict = judge_exports(judge, files, job.prompts)
    write_json_atomic(job.out / "parity.json", verdict.rows)
    write_json_atomic(job.out / golden.GOLDEN, verdict.golden)
    return verdict.rows


def judge_exports(
    judge: ParityJudge, files: Sequence[ExportedFile], prompts: list[golden.Prompt] | None
) -> ParityVerdict:
    """Judge every file, then GGUF against ONNX; writes nothing.

    Args:
        files: in the order in which their rows shall stand.
        prompts: golden prompts with the teacher's answers; None: the student is the teacher, and answers itself.
    """
    tokenizer = load_tokenizer(judge.model)
    text = text_of(tokenizer, min(PARITY_TOKENS, judge.length - GREEDY_TOKENS))
    continuations = {file.kind: judge.continuation(file, text) for file in files}
    teacher = "the profile's logit cache" if prompts is not None else "the exported checkpoint itself"
    references, prompts = _read_students(judge, files, text, continuations, prompts)
    pairs = _pairs(files)
    paired_kinds, paired_logits = {kind for pair in pairs for kind in pair}, dict[str, np.ndarray]()
    rows, scores = list[dict[str, Any]](), dict[str, dict[str, Any]]()
    for file in files:
        expected = references[file.student or judge.model]
        with judge.open(file) as artifact:
            logits_SV = artifact.logits(expected.ids_S)
            row = judge.row(file, artifact, expected, continuations[file.kind], logits_SV)
            row["tokenizer"] = check_tokenizer(file.kind, tokenizer, artifact, file.path)
            if file.delivered:
                scores[file.delivered] = golden.expected_score(prompts, artifact)
        if file.kind in paired_kinds:
            paired_logits[file.kind] = logits_SV
        _log(row)
        rows.append(row)
    limits_of = {row["artifact"]: row["limits"] for row in rows}
    student_SV = references[judge.model].logits_SV
    rows += [_pair_row(pair, paired_logits, student_SV, limits_of[pair[0]]) for pair in pairs]
    content = {"schema": golden.GOLDEN_SCHEMA, "teacher": teacher, "prompts": prompts, "expected": scores}
    return ParityVerdict(rows, content)


def _read_students(
    judge: ParityJudge,
    files: Sequence[ExportedFile],
    text: Text,
    continuations: Continuations,
    prompts: list[golden.Prompt] | None,
) -> tuple[dict[Path, Reference], list[golden.Prompt]]:
    """The answers of each checkpoint that a file is compared with, and the golden prompts."""
    found: dict[Path, Reference] = {}
    for path in dict.fromkeys([judge.model, *(file.student for file in files if file.student)]):
        asked = [continuations[file.kind] for file in files if (file.student or judge.model) == path]
        with open_student(path, threads=judge.threads, context_length=judge.length) as student:
            found[path] = reference(student, text, asked, golden.pieces(text.ids_S) if prompts is None else [])
            prompts = golden.from_model(student, text.ids_S) if prompts is None else prompts
    assert prompts is not None  # the student itself has answered
    return found, prompts


def _pairs(files: Sequence[ExportedFile]) -> list[tuple[str, str]]:
    """(GGUF, ONNX) to compare: the full-precision files, and the main delivered ones."""
    kinds = {file.kind for file in files}
    main: dict[str, str] = {}
    for file in files:
        if file.delivered:
            main.setdefault(file.runtime, file.kind)
    full = [parity.FULL_PRECISION] if kinds.issuperset(parity.FULL_PRECISION) else []
    return [*full, *([(main["llama_cpp"], main["ort"])] if len(main) == 2 else [])]


def _pair_row(
    pair: tuple[str, str], logits: dict[str, np.ndarray], student_SV: np.ndarray, limits: dict[str, Any] | None
) -> dict[str, Any]:
    gguf, onnx = pair
    full = limits if pair == parity.FULL_PRECISION else None
    row = parity.agree(gguf, onnx, logits[gguf], logits[onnx], student_SV, full)
    log.info("parity %s against %s: KL %.2e nats", gguf, onnx, row["kl_nats"])
    return {"artifact": f"{gguf} against {onnx}"} | row


def _log(row: dict[str, Any]) -> None:
    found = f"KL {row['kl_nats']:.2e} nats, greedy {row['greedy_equal']}/{row['greedy_compared']}"
    log.info("parity %s: %s; judged by: %s", row["artifact"], found, _rule(row))


def _rule(row: dict[str, Any]) -> str:
    if row["rule"] is None:
        return "nothing here, it is quantized"
    clear = f"{row['clear_tokens']} tokens clear of router ties, of {row['clear_candidates']}"
    return f"{row['rule']} ({clear})" + (f"; {row['looser_because']}" if row["looser_because"] else "")
