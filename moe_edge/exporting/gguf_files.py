"""The GGUF half of an export: a float16 reference, the delivered types made from it, each audited, some cut into parts.

Everything that can be refused is refused before the first byte: types that need an importance matrix, recipes that do not
exist. Finished files are renamed into place, so that a killed export goes on after the last one.
"""

import logging
from pathlib import Path

import numpy as np

from moe_edge.contracts.artifacts import ExportedArtifact
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.quantization import NEEDS_IMATRIX, tensor_bytes
from moe_edge.contracts.units import format_bytes
from moe_edge.exporting.gguf import write_gguf
from moe_edge.exporting.gguf_audit import audit, expected_tensors
from moe_edge.exporting.gguf_quantize import quantize_gguf
from moe_edge.exporting.gguf_split import split_gguf
from moe_edge.exporting.imatrix import imatrix_arrays
from moe_edge.exporting.job import ExportedFile, ExportJob, WrittenFiles, write_once
from moe_edge.runtimes.gguf_header import parts_of

log = logging.getLogger(__name__)


def export_gguf_files(job: ExportJob) -> WrittenFiles:
    """Write and audit the job's GGUF files.

    Raises:
        ConfigError: a type needs an importance matrix and there is none, or parts would be too small.
        MoeEdgeError: a file is not what its recipe says.
    """
    _refuse_early(job)
    full = _float16_reference(job)
    imatrix = imatrix_arrays(job.statistics.imatrix, job.spec, job.kept) if job.statistics else None
    written = WrittenFiles([], [ExportedFile("gguf F16", "llama_cpp", full)], [])
    for recipe in job.recipes:
        artifact, first_part = _quantized(job, recipe, full, imatrix)
        written.artifacts.append(artifact)
        kind = f"gguf {artifact.quantization} delivered"
        written.files.append(ExportedFile(kind, "llama_cpp", first_part, artifact.path))
    return written


def _refuse_early(job: ExportJob) -> None:
    """What headers alone show: a type that needs an importance matrix, a tensor that fits into no part."""
    limit = job.config.export.gguf.split_bytes
    files = {recipe: expected_tensors(job.model, recipe, _mix_of(job, recipe)) for recipe in job.recipes}
    for recipe, tensors in files.items():
        sizes = {name: tensor_bytes(tensor.kind, tensor.shape) for name, tensor in tensors.items()}
        largest = max(sizes, key=lambda name: sizes[name])
        if limit is not None and sizes[largest] > limit:
            why = f"'{largest}' alone takes {format_bytes(sizes[largest])} as {recipe}"
            raise ConfigError(f"parts of {format_bytes(limit)} are too small", where="export.gguf.split_bytes", why=why)
    needing = [recipe for recipe, tensors in files.items() if NEEDS_IMATRIX & {item.kind for item in tensors.values()}]
    if needing and job.statistics is None:
        raise ConfigError(
            f"{needing[0]} needs an importance matrix",
            where="export.gguf.types",
            why="there is no profile of this model",
            next_command="moe-edge profile MODEL first, or another type such as Q2_K",
        )


def _mix_of(job: ExportJob, recipe: str) -> dict[str, str]:
    """The plan's own types are those of the main file."""
    return job.mix if recipe == job.recipes[0] else {}


def _float16_reference(job: ExportJob) -> Path:
    """The audited file that every other type is made from."""
    path, pre_tokenizer = job.reference / "F16.gguf", job.config.export.gguf.pre_tokenizer
    write_once(
        path,
        lambda out: write_gguf(job.model, out, name=job.name, pre_tokenizer=pre_tokenizer, provenance=job.provenance),
    )
    audit([path], job.model, "F16")
    return path


def _quantized(
    job: ExportJob, recipe: str, full: Path, imatrix: dict[str, np.ndarray] | None
) -> tuple[ExportedArtifact, Path]:
    """One delivered file, whole or in parts, and the part that a runtime opens."""
    mix = _mix_of(job, recipe)
    label = f"{recipe}-mix" if mix else recipe
    path = job.out / "gguf" / f"{job.name}-{label}.gguf"
    parts = _finished_parts(path)
    if not parts:

        def quantize(out: Path) -> None:
            log.info("quantizing %s", out.name)
            quantize_gguf(full, out, recipe, imatrix, job.threads, mix)

        write_once(path, quantize)
        limit = job.config.export.gguf.split_bytes
        parts = [path] if limit is None else split_gguf(path, limit)
    sizes, size = audit(parts, job.model, recipe, mix), sum(part.stat().st_size for part in parts)
    files = [f"artifacts/gguf/{part.name}" for part in parts]
    artifact = ExportedArtifact(
        format="gguf",
        runtime="llama_cpp",
        path=files[0],
        quantization=label,
        bytes=size,
        bits_per_weight=job.bits_per_weight(size),
        files=files,
        bytes_by_class=sizes.bytes_by_class,
        bits_per_weight_by_class=sizes.bits_per_weight_by_class,
        fallbacks=sizes.fallbacks,
    )
    return artifact, parts[0]


def _finished_parts(path: Path) -> list[Path]:
    """The parts that an earlier, killed run has cut `path` into; none while it is still there to be cut."""
    first = next(iter(sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))), None)
    return [] if path.exists() or first is None else parts_of(first)
