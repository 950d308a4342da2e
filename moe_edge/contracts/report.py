"""report.json (schema moe-edge/report@1): what a build measured and how it was judged, closed and checked before it is written.

Units are in the names; KL divergences are nats per token over the full vocabulary.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moe_edge.contracts.artifacts import DistillSummary, RoutingHealth
from moe_edge.contracts.measurements import Artifact, Measured, ModelInfo
from moe_edge.contracts.plan import Plan, without_expert_lists

REPORT_SCHEMA: Literal["moe-edge/report@1"] = "moe-edge/report@1"
_CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)
Verdict = Literal["pass", "fail"]


class GateResult(BaseModel):
    """One limit of the target applied to one artifact."""

    model_config = _CLOSED
    name: str
    artifact: str
    limit: float
    value: float | None
    unit: str
    direction: Literal["at most", "at least"]
    passed: bool
    reason: str | None = None

    @model_validator(mode="after")
    def _null_fails_with_a_reason(self) -> Self:
        if self.value is None and (self.passed or not self.reason):
            raise ValueError(f"gate {self.name}: a null value cannot pass and needs a reason")
        return self


class Judgement(BaseModel):
    """What was measured, held against the limits of a target; results.json of a single artifact."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)
    artifacts: list[Artifact] = Field(description="their device has a label: does its speed speak for the target")
    baseline: Artifact = Field(description="the teacher itself, measured as the artifacts were")
    gates: list[GateResult]
    verdict: Verdict
    reasons: list[str] = Field(description="why the verdict is 'fail'; empty on pass")
    notes: list[str] = []
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}

    def to_dict(self) -> dict[str, Any]:
        """results.json as plain data."""
        return self.model_dump(mode="json")


class Prediction(Measured):
    """What the plan expected of an artifact before anything was changed, and what was measured on it."""

    artifact: str = Field(description="path of the artifact")
    masked_kl_nats: float | None = Field(None, description="of the dropped experts, masked in the teacher")
    quantization_kl_nats: float | None = Field(None, description="of the stored bits alone")
    quantization_source: str = Field("prior", description="measured on the teacher, or a prior of another model")
    kl_nats: float | None = Field(None, description="their sum: the KL to the teacher without any recovery")
    achieved_kl_nats: float | None = Field(None, description="KL to the teacher, measured, after recovery")
    achieved_quantization_kl_nats: float | None = Field(
        None, description="KL to the HF student, measured: what quantization and runtime really cost"
    )

    @classmethod
    def _needs_a_reason(cls) -> tuple[str, ...]:
        return ("kl_nats", "achieved_kl_nats")


class StageInfo(BaseModel):
    model_config = _CLOSED
    name: str
    seconds: float
    peak_rss_mib: float | None
    cached: bool


class Report(BaseModel):
    """The whole report."""

    model_config = _CLOSED
    schema_: Literal["moe-edge/report@1"] = Field(REPORT_SCHEMA, alias="schema")
    verdict: Verdict
    reasons: list[str] = Field(description="why the verdict is 'fail'; empty on pass")
    target: str
    teacher: ModelInfo
    student: ModelInfo
    stages: list[StageInfo]
    artifacts: list[Artifact]
    baseline: Artifact | None = Field(default=None, description="the teacher itself, measured as the artifacts were")
    gates: list[GateResult]
    plan: Plan | None = Field(default=None, description="in report.json without the expert lists, which plan.json has")
    predictions: list[Prediction] = []
    curve: dict[str, Any] | None = Field(default=None, description="masked KL against experts kept: plan/curve.json")
    routing_health: RoutingHealth | None = None
    distillation: DistillSummary | None = None
    parity: list[dict[str, Any]] = []
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}
    definitions: dict[str, str] = {}
    notes: list[str] = []
    next_commands: list[str] = []

    @field_validator("plan", mode="before")
    @classmethod
    def _a_written_plan_has_no_expert_lists(cls, plan: Any) -> Any:
        return without_expert_lists(plan)

    @model_validator(mode="after")
    def _a_pass_has_gates(self) -> Self:
        if self.verdict == "pass" and (not self.gates or not all(gate.passed for gate in self.gates)):
            raise ValueError("a pass needs gates, and every one of them passed")
        if self.verdict == "fail" and not self.reasons:
            raise ValueError("a fail needs a reason")
        return self

    def to_dict(self) -> dict[str, Any]:
        """report.json as plain data."""
        return self.model_dump(mode="json", by_alias=True, exclude={"plan": {"kept"}})

    @classmethod
    def read(cls, path: Path) -> "Report":
        """A written report, whose plan has no expert lists (`kept`, `merges`): plan.json has them."""
        return cls.model_validate_json(path.read_bytes())
