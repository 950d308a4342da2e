"""The ONNX half of an export: a float32 reference graph, the delivered folder and, where asked for, one for CUDA inside it.

Each folder is audited. The reference is of the whole student, or of as many of its first layers as fit into memory in
float32. The graph for CUDA is checked but never run here, and a note says so.
"""

from pathlib import Path

from moe_edge.contracts.artifacts import ExportedArtifact
from moe_edge.contracts.errors import ResourceProblem
from moe_edge.contracts.onnx_bits import Provider
from moe_edge.exporting.gguf_audit import StoredSizes
from moe_edge.exporting.job import ExportedFile, ExportJob, WrittenFiles, write_once
from moe_edge.exporting.onnx import export_onnx
from moe_edge.exporting.onnx_audit import audit_onnx
from moe_edge.models.checkpoint_subsets import layers_within, write_first_layers
from moe_edge.process.limits import free_memory_bytes
from moe_edge.storage.checkpoint import inspect_checkpoint

# Of the free memory; beyond it only the first layers are judged in float32, and the report says so.
FP32_MEMORY_SHARE = 0.4
CUDA_NOTE = (
    "artifacts/onnx/cuda is experimental: a float16 graph for ONNX Runtime's CUDA provider, quantized alike. Its "
    "structure, bits and bytes were checked; it was not run, and no number of this report is about it."
)


def export_onnx_files(job: ExportJob) -> WrittenFiles:
    """Write and audit the job's ONNX folders.

    Raises:
        ConfigError: bits are asked for of layers that the model does not have.
        MoeEdgeError: a folder is not what its precision says.
        ResourceProblem: not even the first layer with experts fits into memory in float32.
    """
    options, notes = job.config.export.onnx, list[str]()
    reference = _float32_reference(job, notes)
    folder = job.out / "onnx"
    sizes = _write_quantized(job, folder, job.precision)
    artifact = _artifact(job, folder, sizes)
    delivered = ExportedFile(f"onnx {artifact.quantization} delivered", "ort", folder, artifact.path)
    if options.provider == "cuda":
        _write_quantized(job, folder / "cuda", "fp16" if job.precision == "fp32" else job.precision, "cuda")
        notes.append(CUDA_NOTE)
    return WrittenFiles([artifact], [reference, delivered], notes)


def _write_quantized(job: ExportJob, folder: Path, precision: str, provider: Provider = "cpu") -> StoredSizes:
    """A folder of the whole student, written once, and what the audit found in it."""
    options = job.config.export.onnx
    write_once(
        folder,
        lambda out: export_onnx(
            job.model,
            out,
            precision=precision,
            block_size=options.block_size,
            imatrix=job.statistics.imatrix if job.statistics else None,
            kept=job.kept,
            layer_bits=options.layer_bits,
            provider=provider,
        ),
    )
    return audit_onnx(folder, job.model, precision, options.block_size, options.layer_bits, provider)


def _artifact(job: ExportJob, folder: Path, sizes: StoredSizes) -> ExportedArtifact:
    files = [file for file in folder.iterdir() if file.name.startswith("model.onnx")]
    size = sum(file.stat().st_size for file in files)
    return ExportedArtifact(
        format="onnx",
        runtime="ort",
        path="artifacts/onnx",
        quantization=f"{job.precision}-mix" if job.config.export.onnx.layer_bits else job.precision,
        bytes=size,
        bits_per_weight=job.bits_per_weight(size),
        bytes_by_class=sizes.bytes_by_class,
        bits_per_weight_by_class=sizes.bits_per_weight_by_class,
    )


def _float32_reference(job: ExportJob, notes: list[str]) -> ExportedFile:
    """The graph in float32, of the whole student or of as many of its first layers as fit into memory.

    Raises:
        ResourceProblem: not even the first layer with experts fits, so that nothing would show that the graph is right.
    """
    weights = FP32_MEMORY_SHARE * free_memory_bytes() / 4
    if job.params_total < weights:
        return ExportedFile("onnx fp32", "ort", _float32_graph(job, job.model, job.reference / "onnx-fp32"))
    layers = layers_within(inspect_checkpoint(job.model), weights)
    if layers <= min(job.spec.moe_layers, default=0):
        raise ResourceProblem(
            "the ONNX graph cannot be compared with the student",
            where=str(job.model),
            why="not even its first layers fit into memory in float32",
            next_command="--set export.formats=[gguf], or a machine with more memory",
        )
    student = job.reference / f"first-{layers}-layers"
    write_once(student, lambda out: write_first_layers(job.model, layers, out))
    graph = _float32_graph(job, student, job.reference / f"onnx-fp32-first-{layers}-layers")
    part = f"the first {layers} of {job.spec.layers} layers"
    notes.append(f"the float32 ONNX graph of the whole student would not fit into memory: {part} were compared instead")
    return ExportedFile(f"onnx fp32 ({part})", "ort", graph, student=student)


def _float32_graph(job: ExportJob, student: Path, folder: Path) -> Path:
    """An audited graph in float32, built once."""
    write_once(folder, lambda out: export_onnx(student, out, precision="fp32"))
    audit_onnx(folder, student, "fp32", job.config.export.onnx.block_size)
    return folder
