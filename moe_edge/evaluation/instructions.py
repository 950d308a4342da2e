"""evaluate: what an artifact answers to instruction sets, and how near its answers come to the references.

Writes answers.jsonl (every answer, see `evaluate_answers`) and evaluate.json, schema moe-edge/evaluate@1:

    schema, verdict "pass" | "fail", reasons [..]
    artifact   {path, format, runtime, bytes, digest}
    protocol   {runs, temperature, top_k, top_p, max_prompt_tokens, max_new_tokens, is_minillm_contract}
    sets       {name: {path, sha256, counts, metrics, categories: {category: {counts, metrics}}}}
      counts   n (rows judged), n_answers (rows x runs), statuses {status: answers}, n_empty, empty_rate, n_truncated,
               truncated_rate, repeated_rate, distinct_4, looping_tokens, mean_tokens, reason; of a whole set also n_rows,
               n_excluded_empty_reference, excluded_rows [ids], n_outside_rouge (references without a letter that ROUGE reads)
      metrics  {name: {value, ci95 [low, high], by_seed {run: value}, std_over_seeds, mean_nonempty, reason}}, 0 to 100
    average    {metric: {value, reason}}: plain mean over the sets
    gates      [contracts.report.GateResult]: empty_rate of every set
    encoder    {path, digest, layers} of BERTScore; null where it was not asked for
    definitions {name: text}, notes [..], machine {..}, versions {package: version}

A number that does not exist is null with a reason, never 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_edge.contracts.errors import ConfigError, InputRejected, MoeEdgeError
from moe_edge.contracts.manifest import FileEntry, content_digest, installed_version
from moe_edge.contracts.report import GateResult
from moe_edge.devices.detect import Kind, detect, weight_bytes
from moe_edge.evaluation.answers import ANSWERS_NAME, Journal, Model, Protocol, answer_all
from moe_edge.metrics.text import DEFINITIONS, METRICS, EmptyReferences, judged_rows, score_set
from moe_edge.metrics.text_answers import Answer, Status
from moe_edge.metrics.text_modules import compute, local_encoder
from moe_edge.process import host
from moe_edge.storage.cache import remembered_sha256
from moe_edge.storage.files import read_json, write_json_atomic
from moe_edge.storage.folders import files_of
from moe_edge.texts.instruction_rows import InstructionSet

SCHEMA = "moe-edge/evaluate@1"
RESULT_NAME = "evaluate.json"
ALWAYS = tuple(name for name in METRICS if name != "bertscore")
MAX_EMPTY_RATE = 0.1
BATCH_SIZE = 8
_PACKAGES = ("evaluate", "rouge-score", "sacrebleu", "bert-score")


@dataclass(frozen=True)
class Settings:
    """What a user may choose beside the artifact and the sets."""

    protocol: Protocol = field(default_factory=Protocol)
    batch_size: int = BATCH_SIZE
    max_empty_rate: float = MAX_EMPTY_RATE
    empty_references: EmptyReferences = "exclude"
    bertscore: Path | None = None  # folder of an encoder, or "minilm"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.max_empty_rate <= 1:
            raise ConfigError("the batch size is at least 1 and the empty rate a share between 0 and 1")


def run(artifact: Path, sets: Sequence[InstructionSet], settings: Settings, out: Path) -> dict[str, Any]:
    """Answer, score, gate; writes the files of the module's docstring under `out` and returns evaluate.json.

    Raises:
        ConfigError: no such artifact or encoder, or the context is too short.
        InputRejected: the artifact, its tokenizer or a row cannot be read.
        EnvironmentProblem: a library for a runtime or a metric is missing.
    """
    kind, options = detect(artifact), _metric_options(settings)
    _try_metrics(options)
    model = Model(artifact, kind.runtime, artifact_digest(artifact), host.threads_for(settings.threads))
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / ANSWERS_NAME, model.digest, settings.protocol)
    judged = {one.name: judged_rows(one.rows, settings.empty_references) for one in sets}
    answer_all(
        [row for rows in judged.values() for row in rows], model, settings.protocol, journal, settings.batch_size
    )
    answers = {one.name: _collect(journal, judged[one.name], settings.protocol) for one in sets}
    result = conclude(model, kind, sets, answers, settings, options)
    write_json_atomic(out / RESULT_NAME, result)
    return result


def _collect(journal: Journal, rows: Sequence[Any], protocol: Protocol) -> dict[str, dict[str, Answer]]:
    found = {run: {row.row_id: journal.find(row, run) for row in rows} for run in protocol.runs}
    return {run: {key: one for key, one in by_row.items() if one is not None} for run, by_row in found.items()}


def artifact_digest(path: Path) -> str:
    """sha256 over the artifact's content."""
    if path.is_file():
        return "sha256:" + remembered_sha256(path)
    files = {file.relative_to(path).as_posix(): file for file in files_of(path)}
    return content_digest(
        {name: FileEntry(sha256=remembered_sha256(file), bytes=file.stat().st_size) for name, file in files.items()}
    )


def _metric_options(settings: Settings) -> dict[str, dict[str, Any]]:
    """The metrics of this run and their modules' options."""
    options: dict[str, dict[str, Any]] = {name: {} for name in ALWAYS}
    if settings.bertscore is not None:
        encoder = local_encoder(settings.bertscore)
        layers = read_json(encoder / "config.json").get("num_hidden_layers")
        options["bertscore"] = {"encoder": str(encoder), "layers": layers}
    return options


def _try_metrics(options: Mapping[str, Mapping[str, Any]]) -> None:
    """Every metric on one pair of texts, so that what is missing or broken is known before hours of answering."""
    for name, settings in options.items():
        try:
            compute(name, ["a text"], [["a text"]], **settings)
        except MoeEdgeError:
            raise
        except Exception as error:
            if name != "bertscore":
                raise
            why = f"{type(error).__name__}: {error}"
            raise InputRejected("the BERTScore encoder cannot be used", where=settings["encoder"], why=why) from error


def conclude(
    model: Model,
    kind: Kind,
    sets: Sequence[InstructionSet],
    answers: Mapping[str, Mapping[str, Mapping[str, Answer]]],
    settings: Settings,
    options: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """evaluate.json from the answers."""
    scored = {
        one.name: {"path": str(one.path), "sha256": one.sha256}
        | score_set(one.rows, answers[one.name], options, settings.empty_references)
        for one in sets
    }
    gates = [_gate(name, result["counts"], settings.max_empty_rate) for name, result in scored.items()]
    missed = [f"{gate.artifact}: {_finding(gate)}, limit at most {gate.limit:.4g}" for gate in gates if not gate.passed]
    return {
        "schema": SCHEMA,
        "verdict": "fail" if missed else "pass",
        "reasons": missed,
        "artifact": {
            "path": model.path.name, "format": kind.format, "runtime": kind.runtime, "bytes": weight_bytes(model.path),
            "digest": model.digest,
        },
        "protocol": settings.protocol.to_dict(),
        "sets": scored,
        "average": {name: _average(name, scored) for name in options},
        "gates": [gate.model_dump(mode="json") for gate in gates],
        "encoder": _encoder_facts(options.get("bertscore")),
        "definitions": {name: text for name, text in DEFINITIONS.items() if name in options or name not in METRICS},
        "notes": _notes(scored, answers),
        "machine": host.machine_facts(),
        "versions": host.versions() | {name: installed_version(name) for name in _PACKAGES},
    }  # fmt: skip


def _encoder_facts(options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Which encoder gave the BERTScore: scores compare between runs of the same one only."""
    if options is None:
        return None
    folder = Path(options["encoder"])
    return {"path": str(folder), "digest": artifact_digest(folder), "layers": options["layers"]}


def _gate(name: str, counts: Mapping[str, Any], limit: float) -> GateResult:
    rate = counts["empty_rate"]
    return GateResult(
        name="empty_rate", artifact=name, limit=limit, value=rate, unit="share", direction="at most",
        passed=rate is not None and rate <= limit, reason=counts["reason"] if rate is None else None,
    )  # fmt: skip


def _finding(gate: GateResult) -> str:
    if gate.value is None:
        return f"the share of empty answers was not measured ({gate.reason})"
    return f"the share of empty answers is {gate.value:.4g}"


def _average(metric: str, scored: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    values = {name: result["metrics"][metric]["value"] for name, result in scored.items()}
    missing = [name for name, value in values.items() if value is None]
    if missing:
        return {"value": None, "reason": f"no value for {', '.join(missing)}"}
    return {"value": sum(values.values()) / len(values), "reason": None}


def _notes(
    scored: Mapping[str, Mapping[str, Any]], answers: Mapping[str, Mapping[str, Mapping[str, Answer]]]
) -> list[str]:
    notes = []
    for name, result in scored.items():
        counts = result["counts"]
        failures = [
            one for by_row in answers[name].values() for one in by_row.values() if one.status is Status.EXCEPTION
        ]
        if counts["n_excluded_empty_reference"]:
            notes.append(f"{name}: {counts['n_excluded_empty_reference']} rows have no reference and are left out")
        if counts["n_outside_rouge"]:
            notes.append(
                f"{name}: {counts['n_outside_rouge']} rows have references without a letter a-z or digit: ROUGE-L gives "
                "them 0 whatever the answer, read chrF"
            )
        if failures:
            notes.append(f"{name}: the runtime failed on {len(failures)} answers, first: {failures[0].error}")
    return notes
