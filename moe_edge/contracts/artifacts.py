"""What stages hand each other: folders that know their own files, the typed summary of each, and where a stage computes.

A stage is a function `run(config, teacher, out, *, <earlier folders by name>) -> Summary`: it writes its files under `out`,
never outside, and returns a summary. The pipeline writes manifest.json last, with that summary in it; the next stage gets the
folder as one of the values below, opened and checked. Torch-free.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.contracts.manifest import Manifest, read_manifest
from moe_edge.contracts.measurements import Artifact, ModelInfo
from moe_edge.contracts.plan import Plan

_CLOSED = ConfigDict(extra="forbid", frozen=True)
Interval = tuple[float, float]


class Placement(BaseModel):
    """Where a stage computes; decided once (process/placement.py), kept in the stage's folder, read again on resume."""

    model_config = _CLOSED
    device: str = Field("cpu", description="cpu, or cuda:N of this process")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="of the teacher's computation")
    mode: Literal["whole", "streamed"] = Field("whole", description="is the teacher held in memory, or one layer of it")
    processes: int = Field(1, ge=1, description="that share the stage's work")

    @property
    def whole(self) -> bool:
        return self.mode == "whole"


class ProfileSummary(BaseModel):
    """What was measured on the calibration rows; lists have an entry per MoE layer, null where there is no evidence."""

    model_config = _CLOSED
    mode: str
    dtype: str
    moe_layers: list[int]
    tokens: int
    asked_tokens: int
    rows: int
    calibration_digest: str
    cka_tokens: int
    no_evidence: list[list[int]] = Field(description="experts that no token was routed to")
    super_experts: list[list[int]]
    sink_share: list[float]
    gate_mass: list[float]
    router_entropy_nats: list[float]
    mean_cka: list[float | None] = Field(description="over pairs of different experts with evidence")
    mean_cka_ci95: list[Interval | None]
    cka_null: list[float | None] = Field(description="what is left when one expert's tokens are shuffled")
    mean_gated_cka: list[float | None]
    note: str | None = None


class RoutingHealth(BaseModel):
    """Load of the experts in teacher and student on the same rows, before anything is trained."""

    model_config = _CLOSED
    tokens: int
    teacher: dict[str, int | float | None] = Field(description="means over layers, and all dead experts")
    student: dict[str, int | float | None]
    layers: list[dict[str, Any]] = Field(description="the same of every layer")
    alarms: list[str]


class CompressSummary(BaseModel):
    """What the plan made of the teacher."""

    model_config = _CLOSED
    teacher: ModelInfo
    student: ModelInfo = Field(description="with what the action did: its name, pairs merged, output missed, ...")
    routing_health: RoutingHealth | None = None


class HeldOut(BaseModel):
    """A student on rows that were not trained on."""

    model_config = _CLOSED
    kl_nats: float | None = Field(None, description="mean KL(teacher || student), nats per token")
    projected_kl_nats: float | None = Field(None, description="the same where the tokenizers differ")
    cka_mean: float | None = None
    cka_by_layer: list[float | None] | None = Field(None, description="teacher to student; null: not measured")


class TrainedStage(BaseModel):
    """One stage of a training; losses are means over the first and the last tenth of its steps."""

    model_config = _CLOSED
    stage: str
    steps: int
    tokens: int
    teacher: str = Field("unknown", description="where the teacher's logits came from: cached | live")
    first_and_last: dict[str, tuple[float | None, float | None]]


class DistillSummary(BaseModel):
    """What training won, and which student goes on."""

    model_config = _CLOSED
    trained: bool
    kept: Literal["trained", "untrained"]
    reason: str
    tokens_trained: int = 0
    held_out_tokens: int | None = None
    held_out_kl: str | None = Field(None, description="what was measured, in words")
    before: HeldOut | None = None
    after: HeldOut | None = None
    cka: str | None = Field(None, description="what CKA was measured, or why none was")
    stages: list[TrainedStage] = []
    seconds_per_stage: dict[str, float] = {}


class ExportedArtifact(BaseModel):
    """One delivered file or folder. Dumped, it has no key for what its format does not have."""

    model_config = _CLOSED
    format: Literal["gguf", "onnx"]
    runtime: Literal["llama_cpp", "ort"]
    path: str = Field(description="below the build's folder; of a file in parts, the first one")
    quantization: str = Field(description="recipe or precision, with -mix where classes or layers have their own types")
    bytes: int
    bits_per_weight: float
    files: list[str] | None = Field(None, description="all parts; a GGUF's alone")
    bytes_by_class: dict[str, int]
    bits_per_weight_by_class: dict[str, float]
    fallbacks: dict[str, int] | None = Field(None, description="'Q4_K -> Q5_0': tensors; a GGUF's alone")

    @model_serializer(mode="wrap")
    def _without_absent(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value is not None}


class ExportSummary(BaseModel):
    """The files that were written, reopened and compared."""

    model_config = _CLOSED
    name: str = Field(description="of the model, in file names")
    artifacts: list[ExportedArtifact] = Field(description="the main file of each format first")
    parity: list[dict[str, Any]] = Field(description="a row per reopened file, and per pair of formats")
    notes: list[str] = []
    imatrix: bool = Field(description="did the quantizer know the columns' importance")


class ValidationSummary(BaseModel):
    """What the delivered files do. Limits are applied later (evaluation/judgement.py), so that they can change alone."""

    model_config = _CLOSED
    artifacts: list[Artifact]
    baseline: Artifact = Field(description="the teacher itself")
    with_student: bool = Field(description="was there an HF student to compare with")
    notes: list[str] = []
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}


Summary = TypeVar("Summary", bound=BaseModel)


@dataclass(frozen=True)
class StageFolder(Generic[Summary]):
    """A finished stage: its folder, what pins it, and what it found out. A subclass knows the names of its files."""

    path: Path
    digest: str
    summary: Summary
    stage: ClassVar[str]
    summary_type: ClassVar[type[BaseModel]]

    @classmethod
    def of(cls, path: Path, manifest: Manifest) -> Self:
        """The folder behind a manifest that was just read or written.

        Raises:
            InputRejected: the summary in it is not of this stage; an older version, or another program, wrote it.
        """
        try:
            summary = cls.summary_type.model_validate(manifest.summary)
        except ValidationError as error:
            command = f"run the build with --from {cls.stage}"
            why = f"its summary is not that of this version: {error.errors()[0]['msg']}"
            raise InputRejected(
                f"the '{cls.stage}' folder cannot be used", where=str(path), why=why, next_command=command
            ) from error
        return cls(path, manifest.digest, summary)  # type: ignore[arg-type]  # `summary_type` is Summary

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a finished folder.

        Raises:
            ConfigError: it has no manifest, so that it is not finished.
            InputRejected: see `of`.
        """
        manifest = read_manifest(path)
        if manifest is None:
            what, command = f"there is no finished '{cls.stage}' stage", "run the build without --from first"
            raise ConfigError(what, where=str(path), next_command=command)
        return cls.of(path, manifest)


class ProfileFolder(StageFolder[ProfileSummary]):
    """profile/: what one pass of the teacher measured."""

    stage, summary_type = "profile", ProfileSummary
    ROWS, STATISTICS, LOGITS = "rows.safetensors", "statistics.safetensors", "logits.h5"
    IMATRIX, CALIBRATION = "imatrix.gguf", "calibration.json"  # for llama.cpp's tools; where the tokens came from

    @property
    def rows(self) -> Path:
        """The very tokens that the teacher read."""
        return self.path / self.ROWS

    @property
    def statistics(self) -> Path:
        return self.path / self.STATISTICS

    @property
    def logits(self) -> Path:
        """The teacher's cached logits on the same rows."""
        return self.path / self.LOGITS


class PlanSummary(BaseModel):
    """The plan's own notes; the plan itself is plan.json, which a user may edit."""

    model_config = _CLOSED
    notes: list[str] = []


class PlanFolder(StageFolder[PlanSummary]):
    """plan/: every decision, as a readable document."""

    stage, summary_type = "plan", PlanSummary
    DOCUMENT, CURVE, CURVE_PICTURE = "plan.json", "curve.json", "curve.svg"

    @property
    def document(self) -> Path:
        return self.path / self.DOCUMENT

    @property
    def curve(self) -> Path:
        """Masked KL against experts kept; only where experts could go."""
        return self.path / self.CURVE

    @cached_property
    def plan(self) -> Plan:
        """The plan, which a user may have edited.

        Raises:
            ConfigError: it is missing or contradicts itself.
        """
        where = str(self.document)
        try:
            return Plan.read(self.document)
        except OSError as error:
            raise ConfigError("there is no plan", where=where, next_command="moe-edge plan") from error
        except ValueError as error:
            raise ConfigError("the plan cannot be used", where=where, why=str(error)) from error


class StudentFolder(StageFolder[Summary]):
    """A folder with a student: model/ is a plain transformers checkpoint, shared_core/ its trainable form, if it has one."""

    @property
    def model(self) -> Path:
        return self.path / "model"


class CompressFolder(StudentFolder[CompressSummary]):
    """compress/: the student as the plan made it."""

    stage, summary_type = "compress", CompressSummary


class DistillFolder(StudentFolder[DistillSummary]):
    """distill/: the student that goes on, trained or not."""

    stage, summary_type = "distill", DistillSummary
    RECIPE = "recipe.json"

    @property
    def recipe(self) -> Path:
        """What was decided before the first step: the stages as they are trained."""
        return self.path / self.RECIPE


class ExportFolder(StageFolder[ExportSummary]):
    """export/: the files to deliver (gguf/, onnx/), those they were checked by (reference/), and golden prompts."""

    stage, summary_type = "export", ExportSummary
    GOLDEN = "golden.json"

    @property
    def gguf(self) -> Path:
        return self.path / "gguf"

    @property
    def onnx(self) -> Path:
        return self.path / "onnx"

    @property
    def golden(self) -> Path:
        """Prompts with the teacher's answers, for device bundles."""
        return self.path / self.GOLDEN

    def location(self, delivered: str) -> Path:
        """Where a file lies before it is delivered: 'artifacts/gguf/x.gguf' is gguf/x.gguf in here."""
        return self.path / Path(delivered).relative_to("artifacts")


class ValidationFolder(StageFolder[ValidationSummary]):
    """validate/: what the files to deliver do on held-out text, and how fast."""

    stage, summary_type = "validate", ValidationSummary


FOLDERS: Mapping[str, type[StageFolder[Any]]] = {
    "profile": ProfileFolder,
    "plan": PlanFolder,
    "compress": CompressFolder,
    "distill": DistillFolder,
    "export": ExportFolder,
    "validate": ValidationFolder,
}
