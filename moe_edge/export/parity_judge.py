"""The export's judge: every file reopened in its runtime and compared with the student, and the formats with each other.

One model is in memory at a time beside the stored logits of the fixed text: first each file says its greedy tokens, then
the student reads everything in one pass (layer by layer where it does not fit), then each file is compared. The same open
runtimes score the golden prompts of the device bundles.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_edge.export import golden, parity
from moe_edge.export.job import Reopened
from moe_edge.export.parity_pairs import FULL_PRECISION, agree
from moe_edge.export.parity_rows import GREEDY_TOKENS, Reference, Text, reference, text_of
from moe_edge.export.tokenizer_parity import check_tokenizer
from moe_edge.models.loading import load_tokenizer
from moe_edge.runtimes import open_runtime
from moe_edge.runtimes.base import Runtime, generate
from moe_edge.runtimes.hf_streamed import open_student

log = logging.getLogger(__name__)
PARITY_TOKENS = 256


@dataclass(frozen=True)
class Verdict:
    """The rows of parity.json and the content of golden.json."""

    rows: list[dict[str, Any]]
    golden: dict[str, Any]


@dataclass(frozen=True)
class Judge:
    """What is the same for all files of an export."""

    model: Path
    family: str
    threads: int
    context_length: int  # of the student

    @property
    def length(self) -> int:
        """Of the contexts that are opened."""
        return min(self.context_length, 2 * PARITY_TOKENS)

    def open(self, export: Reopened) -> Runtime:
        """The file in its runtime; a full-precision GGUF with a float32 cache, since the conversion is judged."""
        exact = export.runtime == "llama_cpp" and parity.limits_of(export.kind, self.family)[0] is not None
        options = {"kv_float32": True} if exact else {}
        return open_runtime(
            export.runtime, export.path, threads=self.threads, context_length=self.length, **options
        )  # fmt: skip

    def said(self, export: Reopened, text: Text) -> tuple[int, ...]:
        """The file's greedy continuation of the prompt."""
        with self.open(export) as artifact:
            return tuple(generate(artifact, text.prompt_ids, GREEDY_TOKENS))

    def compared(
        self, export: Reopened, artifact: Runtime, expected: Reference, said: Sequence[int], logits_SV: np.ndarray
    ) -> dict[str, Any]:
        """The row of an open file. Raises GateFailed where it is a full-precision one, and not the student."""
        limits, _ = parity.limits_of(export.kind, self.family)
        return parity.require(
            export.kind, parity.compare(expected, artifact, said, limits, logits_SV), self.family
        )  # fmt: skip


def judge_exports(judge: Judge, exports: Sequence[Reopened], prompts: list[golden.Prompt] | None) -> Verdict:
    """Judge every file, then GGUF against ONNX.

    Args:
        exports: in the order in which their rows shall stand.
        prompts: golden prompts with the teacher's answers; None: the student is the teacher, and answers itself.

    Raises:
        GateFailed: a full-precision file is not the student, two formats disagree, or a tokenizer differs.
    """
    tokenizer = load_tokenizer(judge.model)
    text = text_of(tokenizer, min(PARITY_TOKENS, judge.length - GREEDY_TOKENS))
    said = {export.kind: judge.said(export, text) for export in exports}
    teacher = "the profile's logit cache" if prompts is not None else "the exported checkpoint itself"
    references, prompts = _read_students(judge, exports, text, said, prompts)
    paired, logits = _paired(exports), {}
    rows, scores = [], {}
    for export in exports:
        expected = references[export.student or judge.model]
        with judge.open(export) as artifact:
            logits_SV = artifact.logits(expected.ids_S)
            row = judge.compared(export, artifact, expected, said[export.kind], logits_SV)
            row["tokenizer"] = check_tokenizer(export.kind, tokenizer, artifact, export.path)
            if export.delivered:
                scores[export.delivered] = golden.expected_score(prompts, artifact)
        if export.kind in paired:
            logits[export.kind] = logits_SV
        _log(row)
        rows.append(row)
    limits_of = {row["artifact"]: row["limits"] for row in rows}
    student_SV = references[judge.model].logits_SV
    rows += [_pair_row(pair, logits, student_SV, limits_of[pair[0]]) for pair in _pairs(exports)]
    return Verdict(rows, {"schema": golden.GOLDEN_SCHEMA, "teacher": teacher, "prompts": prompts, "expected": scores})


def _read_students(
    judge: Judge, exports: Sequence[Reopened], text: Text, said: dict[str, tuple[int, ...]],
    prompts: list[golden.Prompt] | None,
) -> tuple[dict[Path, Reference], list[golden.Prompt]]:  # fmt: skip
    """What each checkpoint says that a file is compared with, and the golden prompts."""
    found: dict[Path, Reference] = {}
    for path in dict.fromkeys([judge.model, *(export.student for export in exports if export.student)]):
        theirs = [said[export.kind] for export in exports if (export.student or judge.model) == path]
        with open_student(path, threads=judge.threads, context_length=judge.length) as student:
            found[path] = reference(student, text, theirs, golden.pieces(text.ids_S) if prompts is None else [])
            prompts = golden.from_model(student, text.ids_S) if prompts is None else prompts
    assert prompts is not None  # the student itself has answered
    return found, prompts


def _pairs(exports: Sequence[Reopened]) -> list[tuple[str, str]]:
    """(GGUF, ONNX) to compare: the full-precision files, and the main delivered ones."""
    kinds = {export.kind for export in exports}
    main: dict[str, str] = {}
    for export in exports:
        if export.delivered:
            main.setdefault(export.runtime, export.kind)
    delivered = (main["llama_cpp"], main["ort"]) if len(main) == 2 else None
    return [*([FULL_PRECISION] if kinds.issuperset(FULL_PRECISION) else []), *([delivered] if delivered else [])]


def _paired(exports: Sequence[Reopened]) -> set[str]:
    return {kind for pair in _pairs(exports) for kind in pair}


def _pair_row(
    pair: tuple[str, str], logits: dict[str, np.ndarray], student_SV: np.ndarray, limits: dict[str, Any] | None
) -> dict[str, Any]:
    gguf, onnx = pair
    full = limits if pair == FULL_PRECISION else None
    row = agree(gguf, onnx, logits[gguf], logits[onnx], student_SV, full)
    log.info("parity %s against %s: KL %.2e nats", gguf, onnx, row["kl_nats"])
    return {"artifact": f"{gguf} against {onnx}"} | row


def _log(row: dict[str, Any]) -> None:
    log.info(
        "parity %s: KL %.2e nats, greedy %d/%d; judged by: %s",
        row["artifact"], row["kl_nats"], row["greedy_equal"], row["greedy_compared"], _rule(row),
    )  # fmt: skip


def _rule(row: dict[str, Any]) -> str:
    if row["rule"] is None:
        return "nothing here, it is quantized"
    clear = f"{row['clear_tokens']} tokens clear of router ties, of {row['clear_candidates']}"
    return f"{row['rule']} ({clear})" + (f"; {row['looser_because']}" if row["looser_because"] else "")
