"""The build configuration: a closed, frozen tree of pydantic models with defaults; every key documented with its unit.

Precedence: defaults < target file < config file < `--set a.b=c` < command-line flags. Reading YAML, merging the layers and
turning validation errors into messages with lines and suggestions is in contracts/config_io.py.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveFloat, Tag, field_validator, model_validator

from moe_edge.contracts.onnx_bits import bits_key
from moe_edge.contracts.target import Target
from moe_edge.contracts.units import ByteSize

_CLOSED = ConfigDict(extra="forbid", frozen=True)

Loss = Literal[
    "ce", "kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd",  # on logits
    "cka", "mse", "cosine", "procrustes",  # on the outputs of layers
    "expert_cka", "expert_diversity",  # on the outputs of experts
    "load_balance", "importance", "router_z", "routing_kl",  # on routers
    "uld", "projected_kl",  # on logits, also where student and teacher have different tokenizers
]  # fmt: skip


class TeacherConfig(BaseModel):
    model_config = _CLOSED
    path: str | None = Field(None, description="folder or hub id; null = the demo teacher")
    revision: str | None = Field(None, description="hub revision")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: float32 on CPU, bfloat16 on CUDA")


class CalibrationConfig(BaseModel):
    model_config = _CLOSED
    recipe: str = Field(
        "default", description="a recipe's name, or a path: .yaml a recipe, .jsonl rows, else UTF-8 text"
    )
    tokens: int = Field(65536, gt=0, description="tokens of the profile pass")
    sequence_length: int = Field(512, ge=8, description="tokens per row")
    seed: int = 0


class LogitCacheConfig(BaseModel):
    model_config = _CLOSED
    k: int = Field(32, ge=1, description="teacher log-probabilities kept per token")
    temperatures: list[float] = Field([1, 1.5, 2, 3, 4], description="temperatures with an exact tail mass")


class ProfileConfig(BaseModel):
    model_config = _CLOSED
    mode: Literal["auto", "whole", "layerwise"] = Field(
        "auto",
        description="whole | layerwise: weights streamed, for a teacher larger than memory | auto: layerwise where the "
        "teacher takes more than 60 % of the free memory",
    )
    cka_tokens: int = Field(8192, ge=0, description="tokens that run through every expert for CKA; 0 = no CKA")
    logits: LogitCacheConfig = LogitCacheConfig()


class PlanConfig(BaseModel):
    model_config = _CLOSED
    criterion: str = Field("auto", description="auto, or one criterion; auto scores all and searches on from the best")
    action: Literal["drop", "merge", "shared-core", "dense"] = Field(
        "drop",
        description="drop | merge into the nearest kept expert | shared-core with low-rank wrappers | dense: one FFN",
    )
    expert_width: int | Literal["keep", "auto"] = Field(
        "auto",
        description="auto: narrower experts compete with fewer ones, by masked KL | keep | neurons kept per expert, a "
        "multiple of 32; 256 where K-quants are exported",
    )
    shared_rank: int = Field(16, gt=0, description="shared-core: rank of each expert's input and output wrapper")
    compensate: bool | Literal["auto"] = Field(
        "auto",
        description="refit the kept experts' down projections by least squares; auto: where something is left out, a "
        "single expert still is one (not in a shared core), and the teacher fits in memory (profile.mode=layerwise: not)",
    )
    sequential: bool = Field(False, description="fit each layer on the output of the compressed layers below it")
    action_tokens: int = Field(
        16384, gt=0, description="calibration tokens on which merges, wrappers and refits are fitted"
    )
    experts: int | float | Literal["auto"] = Field("auto", description="auto | experts kept per layer | fraction kept")
    uneven: bool = Field(
        False,
        description="may layers keep different numbers of experts, as many in all: the criterion's scores decide; only "
        "where padding is exact",
    )
    top_k: int | Literal["keep", "auto"] = Field(
        "keep", description="keep | experts that a token runs | auto: compared by masked KL"
    )
    bits: str = Field("auto", description="auto | a GGUF recipe such as Q4_K_M")
    tokens: int = Field(4096, gt=0, description="calibration tokens on which a choice's masked KL is measured")
    max_kl_nats: float | None = Field(
        None, gt=0, description="nats per token; a plan whose masked KL exceeds this is refused; null: 2"
    )
    force: bool = Field(False, description="accept a plan beyond max_kl_nats, or beyond what is safe")
    curve_tokens: int = Field(1024, gt=0, description="calibration tokens of the safe-ratio curve")
    sensitivity_tokens: int = Field(
        1024, ge=0, description="calibration tokens on which each quantization's cost is measured; 0 = priors"
    )
    search_tokens: int = Field(
        100_000,
        ge=0,
        description="work of the swap search (criterion auto), in tokens of a teacher forward pass; 0 = off",
    )
    within: str | None = Field(
        None, description="an earlier plan.json of this teacher: only experts that it kept may stay (nested plans)"
    )
    super_expert_guard: bool = Field(True, description="super experts stay under every criterion but 'random'")
    seed: int = Field(0, description="seed of the criterion 'random' and of the search")


class LrMultiplier(BaseModel):
    model_config = _CLOSED
    pattern: str = Field(description="regular expression, searched in the parameter's name; the first match wins")
    lr_multiplier: float = Field(ge=0, description="0 = frozen and not in the optimizer")

    @field_validator("pattern")
    @classmethod
    def _it_is_a_regular_expression(cls, value: str) -> str:
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"'{value}' is not a regular expression: {error}") from error
        return value


class TeacherRoutingConfig(BaseModel):
    """Which experts a live teacher uses while it teaches (Kim et al. 2025, "Every Expert Matters")."""

    model_config = _CLOSED
    policy: Literal["own", "ka", "all"] = Field(
        "own",
        description="own: the model's top-k (under a student-aware router all) | ka: knowledge augmentation | all: every "
        "expert, by its gate",
    )
    sample_probability: float = Field(
        0.05, ge=0, le=1, description="ka: lambda, the chance per token and layer to sample experts by their gates"
    )
    experts: int | None = Field(None, ge=1, description="ka: experts per token; null: one fewer than there are")
    draws: int = Field(2, ge=1, description="ka: M, passes of the teacher over each batch")
    mode: Literal["code", "paper"] = Field(
        "code", description="ka: one update on the mean of M losses (their code) | M updates (their algorithm 1)"
    )


class StudentAwareRouterConfig(BaseModel):
    """SAR: the teacher's routers are trained towards the student, with every expert active (same paper, eq. 9)."""

    model_config = _CLOSED
    every: int = Field(1, ge=1, description="optimizer steps between two router steps")
    beta: float = Field(0.01, ge=0, description="weight of the squared variation of the experts' importance")
    learning_rate: float = Field(1e-5, gt=0)
    max_drift_nats: float = Field(
        0.5, gt=0, description="mean KL of the routers to their snapshot; beyond it the snapshot comes back"
    )


class OnPolicyConfig(BaseModel):
    """Rows that the student writes itself (GKD, arXiv 2306.13649), from the beginnings of the training rows."""

    model_config = _CLOSED
    share: float = Field(0.5, gt=0, le=1, description="share of micro-batches that are written by the student")
    prompt_tokens: int = Field(64, ge=1, description="tokens of a row that the student continues")
    new_tokens: tuple[int, int] = Field((32, 128), description="tokens written: at the first step, at the last")
    temperature: float = Field(1.0, gt=0, description="of sampling")
    max_repetition: float = Field(
        0.5, gt=0, le=1, description="share of a row in a repeated suffix from which it is cut there"
    )


class StageConfig(BaseModel):
    """One stage of training. Exactly one of share, steps, num_epochs says how long it lasts."""

    model_config = _CLOSED
    stage_name: str
    losses: dict[Loss, float] = Field(
        {"ce": 1.0, "kl": 1.0, "cka": 0.5},
        description="weights: (1-alpha)*ce*CE + alpha*T^2*(kl*KL + other divergences) + every other loss; 0 = off",
    )
    teacher: Literal["auto", "cached", "live"] = Field(
        "auto", description="where the teacher's logits come from; auto: live only where the cache cannot serve"
    )
    teacher_routing: TeacherRoutingConfig = TeacherRoutingConfig()
    student_aware_router: StudentAwareRouterConfig | None = None
    on_policy: OnPolicyConfig | None = None
    layer_map: Literal["identity", "proportional", "auto"] = Field(
        "identity", description="teacher layer of each student layer; auto: the monotone path of greatest CKA"
    )
    expert_share: float = Field(
        1.0, gt=0, le=1, description="expert_cka: share of a layer's teacher experts that teach, by CKA with the layer"
    )
    alpha: float | None = Field(None, ge=0, le=1, description="this stage's alpha; null: distill.alpha")
    temperature: float | None = Field(None, gt=0, description="this stage's temperature; null: distill.temperature")
    share: float | None = Field(None, gt=0, le=1, description="share of distill.tokens")
    steps: int | None = Field(None, gt=0)
    num_epochs: float | None = Field(None, gt=0)
    learning_rate: PositiveFloat | Literal["auto"] = Field(
        "auto", description="auto: 5e-4 at a hidden size of 256, and falling with its square"
    )
    warmup_share: float = Field(0.1, ge=0, lt=1, description="share of the stage's steps with rising learning rate")
    parameter_lr_multipliers: list[LrMultiplier] = [LrMultiplier(pattern=".*", lr_multiplier=1.0)]


LISTED, KEYWORD = "[list]", "[keyword]"  # tags in the place of an error, which are no keys of the user's
Stages = Annotated[
    Annotated[list[StageConfig], Tag(LISTED)] | Annotated[Literal["auto"], Tag(KEYWORD)],
    Discriminator(lambda value: KEYWORD if isinstance(value, str) else LISTED),
]


class DistillConfig(BaseModel):
    model_config = _CLOSED
    data: str = Field(
        "calibration",
        description="calibration | a path (.yaml recipe, .jsonl, .json, text, a folder of `save_to_disk`) | "
        "datasets:ID[:CONFIG[:SPLIT]] | the folder of a `moe-edge logits capture`",
    )
    tokens: int = Field(65536, gt=0, description="tokens over all stages")
    alpha: float = Field(0.98, ge=0, le=1, description="0 = plain fine-tuning, 1 = pure distillation")
    temperature: float = Field(1, gt=0)
    batch_rows: int = Field(
        1, ge=1, description="rows per optimizer step; of several processes each takes its share of them"
    )
    jsd_beta: float = Field(0.5, gt=0, lt=1, description="jsd: weight of the teacher in the mixture")
    skew: float = Field(
        0.1, gt=0, lt=1, description="skew_kl, skew_reverse_kl: share of the other side that is mixed in"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the matrix products; the weights stay float32. auto: bfloat16 on an accelerator"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass: less memory")
    tensorboard: bool = Field(False, description="write TensorBoard events below distill/tensorboard")
    stages: Stages = Field(
        "auto",
        description="auto: one stage that trains everything, and does with less where memory is short | the stages in "
        "order, which are refused where they do not fit | []: no training",
    )
    seed: int = 0


class GgufConfig(BaseModel):
    model_config = _CLOSED
    types: list[str] | Literal["auto"] = Field("auto", description="auto | recipes such as [F16, Q4_K_M]")
    pre_tokenizer: str | None = Field(None, description="override of tokenizer.ggml.pre")
    split_bytes: ByteSize | None = Field(
        None,
        gt=0,
        description="cut larger files into parts of at most this size, such as 4GB; llama.cpp opens the first",
    )


class OnnxConfig(BaseModel):
    model_config = _CLOSED
    precision: Literal["auto", "fp32", "fp16", "int8", "int4"] = "auto"
    block_size: Literal[32, 64, 128] = Field(32, description="weights that share one scale")
    layer_bits: dict[str, Literal[4, 8, 16, 32]] = Field(
        {},
        description="CLASS or CLASS@FIRST-LAST (decoder layers) -> bits, instead of the precision's; the first match wins; "
        "classes: expert, shared, attention, head, embedding",
    )
    provider: Literal["cpu", "cuda"] = Field(
        "cpu",
        description="cuda: also write a float16 graph for CUDA (Jetson) in onnx/cuda; EXPERIMENTAL: its structure is checked, "
        "it is never run here",
    )

    @field_validator("layer_bits")
    @classmethod
    def _classes_are_known(cls, value: dict[str, int]) -> dict[str, int]:
        for key in value:
            bits_key(key)
        return value

    @model_validator(mode="after")
    def _a_graph_for_cuda_computes_in_float16(self) -> Self:
        if self.provider == "cuda" and self.precision == "fp32":
            raise ValueError("a graph for CUDA computes in float16: precision=fp16, int8 or int4")
        return self

    @property
    def mix(self) -> tuple[tuple[str, str], ...]:
        """`layer_bits` as the planner's packing."""
        return tuple((key, str(bits)) for key, bits in self.layer_bits.items())


class ExportConfig(BaseModel):
    model_config = _CLOSED
    formats: list[Literal["gguf", "onnx"]] | Literal["auto"] = "auto"
    gguf: GgufConfig = GgufConfig()
    onnx: OnnxConfig = OnnxConfig()
    bundle: bool = Field(
        True,
        description="artifacts/bundle/: per format a folder and a .tar for the device, with a runner; changes no stage",
    )


class ValidateConfig(BaseModel):
    model_config = _CLOSED
    device: str = Field("local", description="local | ssh://user@host[:port] | adb:SERIAL")
    text: str = Field("default", description="default (the held-out split) or a path")
    tokens: int = Field(4096, gt=0, description="held-out tokens of the quality judge")
    prompt_tokens: int = Field(128, gt=0)
    new_tokens: int = Field(64, gt=1)
    repetitions: int = Field(5, ge=1, description="measured runs after one full warm-up")


class BuildConfig(BaseModel):
    """The resolved configuration of a build."""

    model_config = _CLOSED
    schema_: Literal["moe-edge/config@1"] = Field("moe-edge/config@1", alias="schema")
    teacher: TeacherConfig = TeacherConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    profile: ProfileConfig = ProfileConfig()
    plan: PlanConfig = PlanConfig()
    distill: DistillConfig = DistillConfig()
    export: ExportConfig = ExportConfig()
    validate_: ValidateConfig = Field(ValidateConfig(), alias="validate")
    target: Target

    @field_validator("target", mode="before")
    @classmethod
    def _target_is_merged(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("target must be the merged target, use --target NAME")
        return value
