"""plan.json: every decision of a build, readable and editable, without a tensor in it.

The planner writes it, the compressor and the exporter obey it. Sizes are bytes, KL divergences are nats per token.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moe_edge.contracts.onnx_bits import Precision
from moe_edge.contracts.quantization import GGML_TYPES, RECIPES, mix_key

PLAN_SCHEMA: Literal["moe-edge/plan@1"] = "moe-edge/plan@1"
WIDTH_STEP = 32  # the smallest block of weights that a quantization shares a scale over
Action = Literal["drop", "merge", "shared-core", "dense"]
KeptExperts = Mapping[int, Sequence[int]]  # decoder layer -> ids of the experts that stay, ascending
UNEVEN_ACTIONS = ("drop", "merge")  # those whose layers may keep different numbers of experts


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
    kv_precision: str = Field("f16", description="f16 or q8_0: what keys and values are planned to be cached in")
    context_length: int | None = Field(None, description="tokens that the KV cache is planned for")
    peak_memory_bytes: int
    decode_bytes_per_token: int | None = Field(None, description="read for one token at a full context")
    decode_tokens_per_s: float | None = Field(
        None, description="roofline estimate (+-25 %); null when the target has no bandwidth"
    )
    routed_expert_share_kept: float


class TriedShape(BaseModel):
    """A top-k and expert width that was compared, with its best count of experts and bits."""

    model_config = ConfigDict(extra="forbid")
    top_k: int
    expert_width: int | None = Field(description="neurons kept per expert; null = all")
    experts_kept: int
    quantization: str
    masked_kl_nats: float = Field(
        description="of the best ranking criterion's choice on plan.curve_tokens, nats per token"
    )
    refitted_kl_nats: float | None = Field(
        None,
        description="of the same choice refitted on up to 4096 tokens, nats per token; null: nothing is, or no room",
    )
    quantization_kl_nats: float = Field(description="of its bits, nats per token")
    kl_nats: float = Field(description="refitted, else masked, and the bits: the least one was chosen")
    file_bytes: int
    decode_tokens_per_s: float | None = Field(description="roofline estimate")


class Plan(BaseModel):
    """What will be done to the teacher."""

    model_config = ConfigDict(extra="forbid")
    schema_: Literal["moe-edge/plan@1"] = Field(PLAN_SCHEMA, alias="schema")
    action: Action = Field(
        "drop",
        description="what becomes of the experts: drop | merge (dropped ones flow into kept ones) | shared-core (one FFN "
        "per layer with low-rank wrappers per expert) | dense (the kept ones side by side in one FFN, no router)",
    )
    criterion: str
    experts_total: int = Field(gt=0)
    experts_kept: int = Field(gt=0, description="per layer; where they are uneven, on average")
    uneven: bool = Field(False, description="do layers keep different numbers of experts, experts_kept on average")
    top_k: int = Field(gt=0)
    teacher_top_k: int | None = Field(None, gt=0, description="null: the same")
    kept: dict[int, list[int]] = Field(description="layer -> kept expert ids of the teacher, ascending")
    merges: dict[int, dict[int, int]] = Field(
        {},
        description="merge: layer -> dropped expert -> the kept expert that takes it in, if the gate accepts the pair",
    )
    expert_width: int | None = Field(
        None, description="neurons kept per expert, a multiple of 32 (of 256 for K-quants); null keeps all"
    )
    shared_rank: int | None = Field(None, gt=0, description="shared-core: rank of the experts' wrappers")
    compensate: bool = Field(
        False, description="refit the kept experts' down projections on calibration tokens by least squares"
    )
    sequential: bool = Field(
        False, description="fit each layer on what the already compressed layers below it put out, not the teacher's"
    )
    action_tokens: int = Field(16384, gt=0, description="calibration tokens on which an action is fitted")
    quantization: str = Field(description="name of the main GGUF recipe, e.g. Q4_K_M")
    quantization_by_class: dict[str, str] = Field(
        {},
        description="CLASS or CLASS@FIRST-LAST (decoder layers) -> ggml type, instead of the recipe's; the first match "
        "wins; classes: attention, expert_gate_up, expert_down, shared, embedding_head",
    )
    onnx_precision: Precision
    predicted_kl_nats: float | None = Field(
        description="masked KL of this choice; null when nothing is dropped and no profile ran"
    )
    quantization_kl_nats: dict[str, float] = Field(
        {}, description="delivered GGUF type -> KL that its bits alone are predicted to cost, nats per token"
    )
    quantization_kl_source: str = Field("prior", description="measured (on the teacher) or prior (of another model)")
    candidates: list[Candidate] = []
    shapes: list[TriedShape] = Field([], description="compared where plan.top_k or plan.expert_width is auto")
    largest_contexts: dict[str, int] = Field(
        {}, description="KV precision -> tokens of context up to which all budgets hold, at most the model's own limit"
    )
    estimate: Estimate
    competitor: str | None = Field(None, description="the other way to meet the budget, and why it lost")
    notes: list[str] = []

    @field_validator("quantization")
    @classmethod
    def _recipe_is_known(cls, name: str) -> str:
        if name not in RECIPES:
            raise ValueError(f"unknown recipe '{name}', known: {', '.join(RECIPES)}")
        return name

    @field_validator("quantization_by_class")
    @classmethod
    def _types_are_known(cls, mix: dict[str, str]) -> dict[str, str]:
        for key, kind in mix.items():
            mix_key(key)
            if kind not in GGML_TYPES:
                raise ValueError(f"{key}: unknown ggml type '{kind}', known: {', '.join(GGML_TYPES)}")
        return mix

    @model_validator(mode="after")
    def _kept_is_consistent(self) -> "Plan":
        for layer, ids in self.kept.items():
            wrong = len(ids) != self.experts_kept if not self.uneven else len(ids) < self.top_k
            if wrong or sorted(set(ids)) != ids:
                expected = f"at least {self.top_k}" if self.uneven else str(self.experts_kept)
                raise ValueError(f"layer {layer}: expected {expected} ascending expert ids, got {ids}")
            if ids and not 0 <= ids[0] <= ids[-1] < self.experts_total:
                raise ValueError(f"layer {layer}: ids must lie in 0..{self.experts_total - 1}, got {ids}")
        total = sum(map(len, self.kept.values()))
        if self.uneven and total != self.experts_kept * len(self.kept):
            raise ValueError(f"{total} experts in {len(self.kept)} layers are not {self.experts_kept} on average")
        if self.uneven and self.action not in UNEVEN_ACTIONS:
            raise ValueError(f"uneven layers do not go with the action {self.action}")
        if self.top_k > self.experts_kept:
            raise ValueError(f"top_k {self.top_k} exceeds the {self.experts_kept} kept experts")
        return self

    @model_validator(mode="after")
    def _action_is_consistent(self) -> "Plan":
        if self.merges and self.action != "merge":
            raise ValueError(f"merges are given, but the action is {self.action}")
        for layer, pairs in self.merges.items():
            kept = set(self.kept.get(layer, ()))
            wrong = {one: other for one, other in pairs.items() if one in kept or other not in kept}
            if wrong or not all(0 <= one < self.experts_total for one in pairs):
                raise ValueError(f"layer {layer}: merges go from a dropped to a kept expert, got {wrong or pairs}")
        if self.expert_width is not None and (self.expert_width < WIDTH_STEP or self.expert_width % WIDTH_STEP):
            raise ValueError(f"expert_width must be a positive multiple of {WIDTH_STEP}, got {self.expert_width}")
        if self.shared_rank is not None and self.action != "shared-core":
            raise ValueError(f"shared_rank is given, but the action is {self.action}")
        if self.compensate and self.action == "shared-core":
            raise ValueError("compensate refits experts one by one, which a shared core does not have")
        return self

    @property
    def main_label(self) -> str:
        """The main GGUF file's type: the recipe, with '-mix' where this plan replaced types of it."""
        return f"{self.quantization}-mix" if self.quantization_by_class else self.quantization

    @property
    def places(self) -> int:
        """Experts per layer of the student's checkpoint: those of the largest layer, where smaller ones are padded."""
        return max(map(len, self.kept.values()), default=self.experts_kept) if self.uneven else self.experts_kept

    @property
    def prunes(self) -> bool:
        return self.experts_kept < self.experts_total

    @property
    def alters(self) -> bool:
        """Does the student compute something else than the teacher, so that there is something to recover?"""
        fewer = self.teacher_top_k not in (None, self.top_k)
        return self.prunes or fewer or self.expert_width is not None or self.action in ("shared-core", "dense")

    @property
    def fits(self) -> bool:
        """Is something fitted on calibration tokens, so that the teacher must run?"""
        return self.compensate or self.action in ("shared-core", "dense") or bool(self.merges)

    def to_json(self) -> str:
        return self.model_dump_json(indent=1, by_alias=True) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Plan":
        return cls.model_validate_json(path.read_text())


def without_expert_lists(plan: Any) -> Any:
    """A plan that was written without its lists, so that it can be read again: `kept` and `merges` are empty then.

    Merges without the kept experts would contradict themselves. Other values come back as they are.
    """
    if isinstance(plan, dict) and "kept" not in plan:
        return plan | {"kept": {}, "merges": {}}
    return plan
