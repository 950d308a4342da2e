"""The GGUF half of `export`: a float16 reference, the delivered types made from it, each audited, some cut into parts.

Everything that can be refused is refused before the first byte: types that need an importance matrix, recipes that do not
exist. Finished files are renamed into place, so that a killed export goes on after the last one.
"""

import logging
from pathlib import Path
from typing import Any

from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.quantization import NEEDS_IMATRIX, tensor_bytes
from moe_edge.contracts.units import format_bytes
from moe_edge.export.gguf import write_gguf
from moe_edge.export.gguf_audit import audit, expected_tensors
from moe_edge.export.gguf_quantize import quantize_gguf
from moe_edge.export.gguf_split import split_gguf
from moe_edge.export.imatrix import imatrix_arrays
from moe_edge.export.job import Job, Reopened
from moe_edge.process.host import threads_for
from moe_edge.runtimes.gguf_header import parts_of

log = logging.getLogger(__name__)


def export_gguf(job: Job, artifacts: list[dict[str, Any]], reopened: list[Reopened]) -> None:
    """Write and audit the job's GGUF files; append their rows, and the files that parity is to reopen.

    Raises:
        ConfigError: a type needs an importance matrix and there is none, or parts would be too small.
        MoeEdgeError: a file is not what its recipe says.
    """
    _refuse_early(job)
    full = job.out / "reference" / "F16.gguf"
    if not full.exists():
        full.parent.mkdir(parents=True, exist_ok=True)
        pre = job.config.export.gguf.pre_tokenizer
        write_gguf(job.model, full, name=job.name, pre_tokenizer=pre, provenance=job.provenance)
    audit([full], job.model, "F16")
    reopened.append(Reopened("gguf F16", "llama_cpp", full))
    imatrix = imatrix_arrays(job.statistics.imatrix, job.spec, job.kept) if job.statistics else None
    threads = threads_for(job.config.target.runtime.threads)
    for recipe in job.recipes:
        mix = _mix_of(job, recipe)
        label = f"{recipe}-mix" if mix else recipe
        path = job.out / "gguf" / f"{job.name}-{label}.gguf"
        parts = _finished_parts(path)
        if not parts:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                log.info("quantizing %s", path.name)
                quantize_gguf(full, path, recipe, imatrix, threads, mix)
            limit = job.config.export.gguf.split_bytes
            parts = [path] if limit is None else split_gguf(path, limit)
        told = audit(parts, job.model, recipe, mix)
        artifacts.append(_row(job, label, parts) | told)
        reopened.append(Reopened(f"gguf {label} delivered", "llama_cpp", parts[0], artifacts[-1]["path"]))


def _mix_of(job: Job, recipe: str) -> dict[str, str]:
    """The plan's own types are those of the main file."""
    return job.mix if recipe == job.recipes[0] else {}


def _refuse_early(job: Job) -> None:
    """What headers alone show: a type that needs an importance matrix, a tensor that fits into no part."""
    limit = job.config.export.gguf.split_bytes
    files = {recipe: expected_tensors(job.model, recipe, _mix_of(job, recipe)) for recipe in job.recipes}
    for recipe, tensors in files.items():
        name, size = max(((n, tensor_bytes(t.kind, t.shape)) for n, t in tensors.items()), key=lambda pair: pair[1])
        if limit is not None and size > limit:
            why = f"'{name}' alone takes {format_bytes(size)} as {recipe}"
            raise ConfigError(f"parts of {format_bytes(limit)} are too small", where="export.gguf.split_bytes", why=why)
    needing = [recipe for recipe, tensors in files.items() if NEEDS_IMATRIX & {item.kind for item in tensors.values()}]
    if needing and job.statistics is None:
        raise ConfigError(
            f"{needing[0]} needs an importance matrix", where="export.gguf.types", why="there is no profile of this model",
            next_command="moe-edge profile MODEL first, or another type such as Q2_K",
        )  # fmt: skip


def _finished_parts(path: Path) -> list[Path]:
    """The parts that an earlier, killed run has cut `path` into; none while it is still there to be cut."""
    first = next(iter(sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))), None)
    return [] if path.exists() or first is None else parts_of(first)


def _row(job: Job, label: str, parts: list[Path]) -> dict[str, Any]:
    size = sum(part.stat().st_size for part in parts)
    return {
        "format": "gguf", "runtime": "llama_cpp", "path": f"artifacts/gguf/{parts[0].name}", "quantization": label,
        "bytes": size, "bits_per_weight": round(8 * size / job.params_total, 3),
        "files": [f"artifacts/gguf/{part.name}" for part in parts],
    }  # fmt: skip
