"""evaluate.json (schema moe-edge/evaluate@1): how near an artifact's answers to instruction sets come to the references.

Scores go from 0 to 100. A number that does not exist is null with a reason, never 0.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_edge.contracts.report import GateResult, Verdict

EVALUATE_SCHEMA: Literal["moe-edge/evaluate@1"] = "moe-edge/evaluate@1"
_CLOSED = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AnsweredBy(BaseModel):
    """The artifact that answered."""

    model_config = _CLOSED
    path: str
    format: Literal["gguf", "onnx", "hf"]
    runtime: Literal["llama_cpp", "ort", "hf"]
    bytes: int
    digest: str


class ProtocolFacts(BaseModel):
    """How the answers were generated."""

    model_config = _CLOSED
    runs: list[str] = Field(description="names: the seeds, or 'greedy'")
    temperature: float
    top_k: int
    top_p: float
    max_prompt_tokens: int
    max_new_tokens: int
    is_minillm_contract: bool


class AnswerCounts(BaseModel):
    """What became of the answers to some rows."""

    model_config = _CLOSED
    n: int = Field(description="rows judged")
    n_answers: int = Field(description="rows x runs")
    statuses: dict[str, int]
    n_empty: int
    empty_rate: float | None
    n_truncated: int
    truncated_rate: float | None
    repeated_rate: float | None
    distinct_4: float | None
    looping_tokens: float | None
    mean_tokens: float | None
    reason: str | None = Field(description="why rates and means are null")


class SetCounts(AnswerCounts):
    """The same of a whole set, and which rows are not among them."""

    n_rows: int
    n_excluded_empty_reference: int
    excluded_rows: list[str]
    n_outside_rouge: int = Field(description="references without a letter that ROUGE reads")


class MetricScore(BaseModel):
    """One metric over some rows."""

    model_config = _CLOSED
    value: float | None
    ci95: tuple[float, float] | None = Field(description="bootstrap over rows")
    by_seed: dict[str, float] = Field(description="run -> value")
    std_over_seeds: float | None
    mean_nonempty: float | None = Field(description="over the answers that hold text")
    reason: str | None


class CategoryScores(BaseModel):
    """Rows of one category of a set."""

    model_config = _CLOSED
    counts: AnswerCounts
    metrics: dict[str, MetricScore]


class SetScores(BaseModel):
    """One instruction set."""

    model_config = _CLOSED
    path: str
    sha256: str
    counts: SetCounts
    metrics: dict[str, MetricScore]
    categories: dict[str, CategoryScores]


class Average(BaseModel):
    """Plain mean of a metric over the sets."""

    model_config = _CLOSED
    value: float | None
    reason: str | None


class Encoder(BaseModel):
    """What gave the BERTScore: scores compare between runs of the same encoder only."""

    model_config = _CLOSED
    path: str
    digest: str
    layers: int | None


class Evaluation(BaseModel):
    """The whole result."""

    model_config = _CLOSED
    schema_: Literal["moe-edge/evaluate@1"] = Field(EVALUATE_SCHEMA, alias="schema")
    verdict: Verdict
    reasons: list[str]
    artifact: AnsweredBy
    protocol: ProtocolFacts
    sets: dict[str, SetScores]
    average: dict[str, Average] = Field(description="metric -> mean over the sets")
    gates: list[GateResult] = Field(description="empty_rate and truncated_rate of every set")
    encoder: Encoder | None = Field(description="null where BERTScore was not asked for")
    definitions: dict[str, str]
    notes: list[str]
    machine: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """evaluate.json as plain data."""
        return self.model_dump(mode="json", by_alias=True)
