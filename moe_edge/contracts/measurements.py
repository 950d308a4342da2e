"""What is measured on a model: its quality, speed and memory, and the row of a report that holds them.

A number that was not measured is null with a reason beside it, never 0: the models refuse a null without one. Units are
in the names; KL divergences are nats per token over the full vocabulary.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)
Interval = tuple[float, float]


class Measured(BaseModel):
    """Base of everything that is measured: a null main number needs a reason."""

    model_config = _CLOSED
    reason: str | None = Field(default=None, description="why a number beside it is null")

    @model_validator(mode="after")
    def _null_has_a_reason(self) -> Self:
        missing = [name for name, value in self if value is None and name in self._needs_a_reason()]
        if missing and not self.reason:
            raise ValueError(f"{', '.join(missing)}: null without a reason")
        return self

    @classmethod
    def _needs_a_reason(cls) -> tuple[str, ...]:
        return ()


class Quality(Measured):
    """The artifact's own outputs on held-out text; `student_reason` speaks for the numbers to the student."""

    kl_nats: float | None = Field(
        default=None, description="mean KL(teacher || artifact), nats per token, full vocabulary"
    )
    kl_nats_ci95: Interval | None = Field(default=None, description="bootstrap over rows; null with a single row")
    kl_to_student_nats: float | None = Field(
        default=None, description="mean KL(HF student || artifact), nats per token"
    )
    kl_to_student_nats_ci95: Interval | None = None
    top1_agreement: float | None = Field(default=None, description="share of positions with the teacher's argmax")
    top1_agreement_to_student: float | None = None
    perplexity: float | None = Field(default=None, description="of the artifact on the next-token targets")
    teacher_perplexity: float | None = Field(default=None, description="of the teacher on the same targets")
    n_tokens: int = 0
    student_reason: str | None = None

    @classmethod
    def _needs_a_reason(cls) -> tuple[str, ...]:
        return ("kl_nats", "top1_agreement", "perplexity", "teacher_perplexity")


class Speed(Measured):
    """Medians over repeated runs; the definitions are printed in the report."""

    ttft_ms_p50: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    decode_p95_ms: float | None = Field(default=None, description="needs at least 200 intervals")
    n_runs: int = 0
    cov: float | None = Field(default=None, description="stdev / mean of the runs' decode tokens per second")
    n_intervals: int = 0

    @classmethod
    def _needs_a_reason(cls) -> tuple[str, ...]:
        return ("ttft_ms_p50", "prefill_tokens_per_s", "decode_tokens_per_s", "decode_p95_ms", "cov")


class Memory(Measured):
    """Of the fresh process that ran the artifact."""

    peak_rss_mib: float | None = Field(default=None, description="whole process: interpreter, runtime, model, KV cache")
    baseline_rss_mib: float | None = Field(default=None, description="the same process before the model was opened")
    peak_uss_mib: float | None = Field(
        default=None, description="pages that no other process or file shares, during warm-up"
    )

    @classmethod
    def _needs_a_reason(cls) -> tuple[str, ...]:
        return ("peak_rss_mib",)


class Artifact(BaseModel):
    """One delivered model, or the teacher or student as transformers runs it."""

    model_config = _CLOSED
    format: Literal["gguf", "onnx", "hf"]
    runtime: Literal["llama_cpp", "ort", "hf"]
    quantization: str | None = Field(default=None, description="recipe or precision; null = as trained")
    path: str = Field(description="relative to the run's folder")
    bytes: int
    bits_per_weight: float | None = None
    bytes_by_class: dict[str, int] = Field(
        default={}, description="tensor class -> bytes of its weights; empty = the export did not tell"
    )
    bits_per_weight_by_class: dict[str, float] = Field(default={}, description="of the same classes, scales included")
    fallbacks: dict[str, int] = Field(
        default={}, description="'Q4_K -> Q5_0' -> tensors whose rows are no multiple of the first type's block"
    )
    quality: Quality
    speed: Speed
    memory: Memory
    device: dict[str, Any] = Field(description="where it was measured; label 'host' = speed says nothing of the target")


class ModelInfo(BaseModel):
    """The teacher or the student as a model."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    params_total: int
    params_active: int
    experts: int
    top_k: int
    bytes: int
