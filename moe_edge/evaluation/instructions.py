"""What an artifact answers to instruction sets, and how near its answers come to the references.

Writes answers.jsonl (every answer, see answers.py) and evaluate.json (contracts/evaluation.py). The metrics are tried before the
first answer is generated, so that a missing library or a broken encoder costs no hours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_edge.contracts.errors import ConfigError, InputRejected, MoeEdgeError
from moe_edge.contracts.evaluation import EVALUATE_SCHEMA, AnsweredBy, Average, Encoder, Evaluation, SetScores
from moe_edge.contracts.manifest import FileEntry, content_digest, installed_version
from moe_edge.contracts.report import GateResult
from moe_edge.devices.detect import Kind, detect, weight_bytes
from moe_edge.evaluation.answers import ANSWERS_NAME, AnsweringModel, Journal, Protocol, answer_all
from moe_edge.metrics.text import DEFINITIONS, METRICS, NO_ROWS, EmptyReferences, judged_rows, score_set
from moe_edge.metrics.text_answers import Answer, Status
from moe_edge.metrics.text_modules import compute, local_encoder
from moe_edge.process import host
from moe_edge.storage.cache import remembered_sha256
from moe_edge.storage.files import read_json, write_json_atomic
from moe_edge.storage.folders import files_of
from moe_edge.texts.instruction_rows import InstructionRow, InstructionSet

RESULT_NAME = "evaluate.json"
WITHOUT_ENCODER = tuple(name for name in METRICS if name != "bertscore")
MAX_EMPTY_RATE = 0.1
MAX_TRUNCATED_RATE = 0.5  # a model that seldom ends says nothing of how it answers
BATCH_SIZE = 8
_PACKAGES = ("evaluate", "rouge-score", "sacrebleu", "bert-score")
MetricOptions = Mapping[str, Mapping[str, Any]]  # metric -> its module's options
AnswersByRun = Mapping[str, Mapping[str, Answer]]  # run -> row id -> answer


@dataclass(frozen=True)
class EvaluationSettings:
    """What a user may choose beside the artifact and the sets."""

    protocol: Protocol = field(default_factory=Protocol)
    batch_size: int = BATCH_SIZE
    max_empty_rate: float = MAX_EMPTY_RATE
    max_truncated_rate: float = MAX_TRUNCATED_RATE
    empty_references: EmptyReferences = "exclude"
    bertscore: Path | None = None  # folder of an encoder, or "minilm"
    threads: int | None = None

    def __post_init__(self) -> None:
        rates = (self.max_empty_rate, self.max_truncated_rate)
        if self.batch_size < 1 or not all(0 <= rate <= 1 for rate in rates):
            raise ConfigError("the batch size is at least 1, and a largest rate is a share between 0 and 1")


def run(artifact: Path, sets: Sequence[InstructionSet], settings: EvaluationSettings, out: Path) -> Evaluation:
    """Answer, score, gate; writes answers.jsonl and evaluate.json under `out`.

    Raises:
        ConfigError: no such artifact or encoder, or the context is too short.
        InputRejected: the artifact, its tokenizer or a row cannot be read.
        EnvironmentProblem: a library for a runtime or a metric is missing.
    """
    kind, options = detect(artifact), _metric_options(settings)
    _try_metrics(options)
    model = AnsweringModel(artifact, kind.runtime, artifact_digest(artifact), host.threads_for(settings.threads))
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / ANSWERS_NAME, model.digest, settings.protocol)
    judged = {one.name: judged_rows(one.rows, settings.empty_references) for one in sets}
    wanted = [row for rows in judged.values() for row in rows]
    answer_all(wanted, model, settings.protocol, journal, settings.batch_size)
    answers = {one.name: _collect(journal, judged[one.name], settings.protocol) for one in sets}
    result = _conclude(model, kind, sets, answers, settings, options)
    write_json_atomic(out / RESULT_NAME, result.to_dict())
    return result


def artifact_digest(path: Path) -> str:
    """sha256 over the artifact's content."""
    if path.is_file():
        return "sha256:" + remembered_sha256(path)
    files = {file.relative_to(path).as_posix(): file for file in files_of(path)}
    return content_digest(
        {name: FileEntry(sha256=remembered_sha256(file), bytes=file.stat().st_size) for name, file in files.items()}
    )


def _metric_options(settings: EvaluationSettings) -> MetricOptions:
    """The metrics of this run and their modules' options."""
    options: dict[str, dict[str, Any]] = {name: {} for name in WITHOUT_ENCODER}
    if settings.bertscore is not None:
        encoder = local_encoder(settings.bertscore)
        layers = read_json(encoder / "config.json").get("num_hidden_layers")
        options["bertscore"] = {"encoder": str(encoder), "layers": layers}
    return options


def _try_metrics(options: MetricOptions) -> None:
    """Every metric on one pair of texts."""
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


def _collect(journal: Journal, rows: Sequence[InstructionRow], protocol: Protocol) -> AnswersByRun:
    found = {run: {row.row_id: journal.find(row, run) for row in rows} for run in protocol.runs}
    return {run: {key: one for key, one in by_row.items() if one is not None} for run, by_row in found.items()}


def _conclude(
    model: AnsweringModel,
    kind: Kind,
    sets: Sequence[InstructionSet],
    answers: Mapping[str, AnswersByRun],
    settings: EvaluationSettings,
    options: MetricOptions,
) -> Evaluation:
    """Scores, gates and notes from the answers."""
    scored = {one.name: _scores(one, answers[one.name], settings, options) for one in sets}
    gates = [gate for name, scores in scored.items() for gate in _gates(name, scores, settings)]
    missed = [f"{gate.artifact}: {_finding(gate)}, limit at most {gate.limit:.4g}" for gate in gates if not gate.passed]
    missed += [f"{name}: nothing was scored ({NO_ROWS})" for name, scores in scored.items() if not _is_scored(scores)]
    return Evaluation(
        schema=EVALUATE_SCHEMA,
        verdict="fail" if missed else "pass",
        reasons=missed,
        artifact=AnsweredBy(
            path=model.path.name,
            format=kind.format,
            runtime=kind.runtime,
            bytes=weight_bytes(model.path),
            digest=model.digest,
        ),
        protocol=settings.protocol.facts(),
        sets=scored,
        average={name: _average(name, scored) for name in options},
        gates=gates,
        encoder=_encoder_facts(options["bertscore"]) if "bertscore" in options else None,
        definitions={name: text for name, text in DEFINITIONS.items() if name in options or name not in METRICS},
        notes=_notes(scored, answers),
        machine=host.machine_facts(),
        versions=host.versions() | {name: installed_version(name) for name in _PACKAGES},
    )


def _scores(
    instructions: InstructionSet, answers: AnswersByRun, settings: EvaluationSettings, options: MetricOptions
) -> SetScores:
    scores = score_set(instructions.rows, answers, options, settings.empty_references)
    return SetScores(path=str(instructions.path), sha256=instructions.sha256, **scores)


def _encoder_facts(options: Mapping[str, Any]) -> Encoder:
    folder = Path(options["encoder"])
    return Encoder(path=str(folder), digest=artifact_digest(folder), layers=options["layers"])


def _gates(name: str, scores: SetScores, settings: EvaluationSettings) -> list[GateResult]:
    """Of the shares of answers that are empty, and that have no end."""
    counts = scores.counts
    limits = {
        "empty_rate": (counts.empty_rate, settings.max_empty_rate),
        "truncated_rate": (counts.truncated_rate, settings.max_truncated_rate),
    }
    return [
        GateResult(
            name=gate,
            artifact=name,
            limit=limit,
            value=rate,
            unit="share",
            direction="at most",
            passed=rate is not None and rate <= limit,
            reason=counts.reason if rate is None else None,
        )
        for gate, (rate, limit) in limits.items()
    ]


def _finding(gate: GateResult) -> str:
    kind = gate.name.removesuffix("_rate")
    if gate.value is None:
        return f"the share of {kind} answers was not measured ({gate.reason})"
    return f"the share of {kind} answers is {gate.value:.4g}"


def _is_scored(scores: SetScores) -> bool:
    return any(metric.value is not None for metric in scores.metrics.values())


def _average(metric: str, scored: Mapping[str, SetScores]) -> Average:
    values = {name: scores.metrics[metric].value for name, scores in scored.items()}
    known = [value for value in values.values() if value is not None]
    if len(known) < len(values):
        missing = [name for name, value in values.items() if value is None]
        return Average(value=None, reason=f"no value for {', '.join(missing)}")
    return Average(value=sum(known) / len(known), reason=None)


def _notes(scored: Mapping[str, SetScores], answers: Mapping[str, AnswersByRun]) -> list[str]:
    notes = []
    for name, scores in scored.items():
        counts = scores.counts
        every = [one for by_row in answers[name].values() for one in by_row.values()]
        failures = [one for one in every if one.status is Status.EXCEPTION]
        if counts.n_excluded_empty_reference:
            notes.append(f"{name}: {counts.n_excluded_empty_reference} rows have no reference and are left out")
        if counts.n_outside_rouge:
            notes.append(
                f"{name}: {counts.n_outside_rouge} rows have references without a letter a-z or digit: ROUGE-L gives "
                "them 0 whatever the answer, read chrF"
            )
        if failures:
            notes.append(f"{name}: the runtime failed on {len(failures)} answers, first: {failures[0].error}")
    return notes
