"""plan.json: every decision of a build, readable and editable, without a tensor in it.

The planner writes it, the compressor and the exporter obey it. Sizes are bytes, KL divergences are nats per token.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

PLAN_SCHEMA = "moe-edge/plan@1"


class Candidate(BaseModel):
    """One criterion's choice and what masking it in the teacher costs."""

    model_config = ConfigDict(extra="forbid")
    criterion: str
    kl_nats: float = Field(description="masked KL(teacher || teacher with the dropped experts masked), nats per token")
    kl_nats_ci95: tuple[float, float] | None = Field(None, description="bootstrap interval over rows, nats per token")
    n_tokens: int


class Estimate(BaseModel):
    """Predicted sizes and speed of the student in its main quantization."""

    model_config = ConfigDict(extra="forbid")
    params_total: int
    params_active: int
    file_bytes: int
    kv_cache_bytes: int
    peak_memory_bytes: int
    decode_tokens_per_s: float | None = Field(
        None, description="roofline estimate; null when the target has no bandwidth"
    )
    routed_expert_share_kept: float


class Plan(BaseModel):
    """What will be done to the teacher."""

    model_config = ConfigDict(extra="forbid")
    schema_: str = Field(PLAN_SCHEMA, alias="schema")
    action: str = "drop"
    criterion: str
    experts_total: int
    experts_kept: int
    top_k: int
    kept: dict[int, list[int]] = Field(description="layer -> kept expert ids of the teacher, ascending")
    quantization: str = Field(description="name of the main GGUF recipe, e.g. Q4_K_M")
    onnx_precision: str
    predicted_kl_nats: float | None = Field(
        description="masked KL of this choice; null when nothing is dropped and no profile ran"
    )
    candidates: list[Candidate] = []
    estimate: Estimate
    competitor: str | None = Field(None, description="the other way to meet the budget, and why it lost")
    notes: list[str] = []

    @model_validator(mode="after")
    def _kept_is_consistent(self) -> "Plan":
        for layer, ids in self.kept.items():
            if len(ids) != self.experts_kept or sorted(set(ids)) != ids:
                raise ValueError(f"layer {layer}: expected {self.experts_kept} ascending expert ids, got {ids}")
            if ids and not 0 <= ids[0] <= ids[-1] < self.experts_total:
                raise ValueError(f"layer {layer}: ids must lie in 0..{self.experts_total - 1}, got {ids}")
        if self.top_k > self.experts_kept:
            raise ValueError(f"top_k {self.top_k} exceeds the {self.experts_kept} kept experts")
        return self

    @property
    def prunes(self) -> bool:
        return self.experts_kept < self.experts_total

    def to_json(self) -> str:
        return self.model_dump_json(indent=1, by_alias=True) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Plan":
        return cls.model_validate_json(path.read_text())
