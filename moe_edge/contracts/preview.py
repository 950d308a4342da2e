"""A dry run's answer: what fits a target, what it costs and why, from a checkpoint's headers alone.

Before a profile exists, expected KLs are priors; a finished plan of the same wishes has the measured ones and stands beside them.
Sizes are bytes.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from moe_edge.contracts.measurements import ModelInfo
from moe_edge.contracts.plan import Estimate, Plan, without_expert_lists

_CLOSED = ConfigDict(extra="forbid", frozen=True)


class PreviewedChoice(BaseModel):
    """What would be planned."""

    model_config = _CLOSED
    experts_kept: int
    experts_total: int
    top_k: int
    expert_width: int | None = Field(description="neurons kept per expert; null = all")
    quantization: str
    onnx_precision: str
    estimate: Estimate
    largest_contexts: dict[str, int] = Field(description="KV precision -> tokens up to which all budgets hold")
    context_limit: int = Field(description="the model's own")


class PreviewedOption(BaseModel):
    """Another count of experts, type or shape, and why it does not fit, if it does not."""

    model_config = _CLOSED
    experts_kept: int
    top_k: int
    expert_width: int | None
    format: Literal["gguf", "onnx"]
    quantization: str
    context_length: int | None
    kv_precision: str
    file_bytes: int
    peak_memory_bytes: int
    decode_tokens_per_s: float | None
    fits: bool
    why_not: str | None


class PreviewedCriterion(BaseModel):
    """What the experts that a criterion keeps carried in the profile."""

    model_config = _CLOSED
    criterion: str
    routed_share_kept: float = Field(description="of the routed tokens")
    gate_share_kept: float = Field(description="of the mixing weights")


class PlanPreview(BaseModel):
    """The whole answer."""

    model_config = _CLOSED
    teacher: ModelInfo
    target: str
    budget: dict[str, int | float] = Field(description="the limits that are given")
    choice: PreviewedChoice
    competitor: str | None = Field(description="the other way to meet the budget, and why it lost")
    options: list[PreviewedOption]
    shapes: list[PreviewedOption] = Field(description="where top-k or width are free: those that fit, the best first")
    criteria: list[PreviewedCriterion] = Field(description="where there is a profile and experts must go")
    notes: list[str]
    measured: Plan | None = Field(description="a finished plan of the same wishes, without its expert lists")

    @field_validator("measured", mode="before")
    @classmethod
    def _a_shown_plan_has_no_expert_lists(cls, plan: Any) -> Any:
        return without_expert_lists(plan)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return self.model_dump(mode="json", by_alias=True, exclude={"measured": {"kept", "merges"}})
