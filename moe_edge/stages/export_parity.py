"""The export's judge: every file reopened in its runtime and compared with the student, and the formats with each other.

One model is in memory at a time beside the stored logits of the fixed text. The same open runtimes score the golden prompts
of the device bundles.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_edge.export import golden, parity
from moe_edge.export.parity_pairs import FULL_PRECISION, agreement
from moe_edge.export.tokenizer_parity import check_tokenizer
from moe_edge.families.loading import load_tokenizer
from moe_edge.runtimes import open_runtime
from moe_edge.stages.export_job import Reopened

log = logging.getLogger(__name__)
PARITY_TOKENS = 256


@dataclass(frozen=True)
class Verdict:
    """The rows of parity.json and the content of golden.json."""

    rows: list[dict[str, Any]]
    golden: dict[str, Any]


def judge_exports(
    model: Path, exports: Sequence[Reopened], *, threads: int, context_length: int,
    prompts: list[golden.Prompt] | None,
) -> Verdict:  # fmt: skip
    """Judge every file, then GGUF against ONNX.

    Args:
        model: the student's checkpoint.
        exports: in the order in which their rows shall stand.
        prompts: golden prompts with the teacher's answers; None: the student is the teacher, and answers itself.

    Raises:
        GateFailed: a full-precision file is not the student, two formats disagree, or a tokenizer differs.
    """
    tokenizer, length = load_tokenizer(model), min(context_length, 2 * PARITY_TOKENS)
    with open_runtime("hf", model, threads=threads, context_length=length) as student:
        expected = parity.reference(student, tokenizer, PARITY_TOKENS)  # type: ignore[arg-type]  # it is a Student
        teacher = "the profile's logit cache" if prompts is not None else "the exported checkpoint itself"
        prompts = golden.from_model(student, expected.ids_S) if prompts is None else prompts
    paired, logits = _paired(exports), {}
    rows, scores = [], {}
    for export in exports:
        with open_runtime(export.runtime, export.path, threads=threads, context_length=length) as artifact:
            logits_SV = artifact.logits(expected.ids_S)
            row = parity.require(export.kind, parity.compare(expected, artifact, logits_SV))
            row["tokenizer"] = check_tokenizer(export.kind, tokenizer, artifact, export.path)
            if export.delivered:
                scores[export.delivered] = golden.expected_score(prompts, artifact)
        if export.kind in paired:
            logits[export.kind] = logits_SV
        _log(row)
        rows.append(row)
    rows += [_pair_row(pair, logits, expected.logits_SV) for pair in _pairs(exports)]
    return Verdict(rows, {"schema": golden.GOLDEN_SCHEMA, "teacher": teacher, "prompts": prompts, "expected": scores})


def _pairs(exports: Sequence[Reopened]) -> list[tuple[str, str]]:
    """(GGUF, ONNX) to compare: the full-precision files, and the main delivered ones."""
    kinds = {export.kind for export in exports}
    main = {}
    for export in exports:
        if export.delivered:
            main.setdefault(export.runtime, export.kind)
    delivered = (main["llama_cpp"], main["ort"]) if len(main) == 2 else None
    return [*([FULL_PRECISION] if kinds.issuperset(FULL_PRECISION) else []), *([delivered] if delivered else [])]


def _paired(exports: Sequence[Reopened]) -> set[str]:
    return {kind for pair in _pairs(exports) for kind in pair}


def _pair_row(pair: tuple[str, str], logits: dict[str, np.ndarray], student_SV: np.ndarray) -> dict[str, Any]:
    gguf, onnx = pair
    row = agreement(gguf, onnx, logits[gguf], logits[onnx], student_SV)
    log.info("parity %s against %s: KL %.2e nats", gguf, onnx, row["kl_nats"])
    return {"artifact": f"{gguf} against {onnx}"} | row


def _log(row: dict[str, Any]) -> None:
    log.info(
        "parity %s: KL %.2e nats, greedy %d/%d; judged number by number: %s",
        row["artifact"], row["kl_nats"], row["greedy_equal"], row["greedy_compared"],
        f"{row['clear_tokens']} of {row['n_tokens']} tokens" if row["rule"] == "logits and KL"
        else f"no, only {row['clear_tokens']} of {row['n_tokens']} tokens are clear of router ties" if row["rule"]
        else "no, quantized",
    )  # fmt: skip
