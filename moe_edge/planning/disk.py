"""What a build will write, stage by stage, from the header plan alone: so that a full disk is refused before hours are spent.

Files that are only linked (the untrained student, delivered artifacts) count where the disk cannot link. What lies in a stage's
folder already is written no second time. Temporary files count in their stage: a training's checkpoints, the logits that
validation compares, and the hidden states of a streamed profile.

Units: bytes.
"""

from collections.abc import Mapping
from pathlib import Path

from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import ResourceProblem
from moe_edge.contracts.units import format_bytes
from moe_edge.planning.allocation import BudgetAnswer
from moe_edge.planning.estimate import Packing, file_bytes
from moe_edge.process.placement import free_bytes
from moe_edge.storage.folders import bytes_below, free_disk_bytes, links_are_possible

FP32_GRAPH_SHARE = 0.4  # of the free memory: what the float32 graph that ONNX is compared with may take
FORMAT_OVERHEAD = 1.1  # of HDF5 and safetensors with their indices
CHECKPOINT_BYTES = 12  # of a trained weight: itself in float32 and Adam's two moments


def stage_bytes(budget: BudgetAnswer, config: BuildConfig, *, linked: bool = True) -> dict[str, int]:
    """Stage -> what it writes at most.

    Args:
        budget: the header plan of the build.
        linked: can the disk give one file two names? Then a student that was not trained takes no room again.
    """
    model, spec, choice = budget.model, budget.model.spec, budget.choice
    weights = choice.estimate.params_total
    student = model.checkpoint_bytes * weights // model.params_total(spec.moe.experts)
    gguf, onnx = _gguf_files(budget, config), _onnx_files(budget, config)
    trains = budget.alters and _will_train(config, weights)
    return {
        "profile": _profile(budget, config),
        "plan": 1 << 20,
        "compress": student,
        "distill": student + CHECKPOINT_BYTES * weights if trains else 0 if linked else student,
        "export": sum(gguf) + sum(onnx),
        "validate": 2 * 4 * spec.vocab * config.validate_.tokens,  # logits of teacher and student
        "artifacts": sum(files[1] for files in (gguf, onnx) if files) * config.export.bundle  # the bundles' archives
        + (0 if linked else student + sum(gguf[1:]) + sum(onnx[1:])),
    }


def _will_train(config: BuildConfig, weights: int) -> bool:
    """The default recipe is left out where the memory cannot hold it; stages of the user's own are refused there."""
    stages = config.distill.stages
    return bool(stages) if stages != "auto" else (CHECKPOINT_BYTES + 4) * weights <= free_bytes()


def _profile(budget: BudgetAnswer, config: BuildConfig) -> int:
    """The logit cache, the sums of every expert's inputs, and both streams of hidden states while a teacher is streamed."""
    spec, cache, tokens = budget.model.spec, config.profile.logits, config.calibration.tokens
    record = cache.k * spec.vocab.bit_length() // 8 + cache.k + 2 * len(cache.temperatures) + 4  # and the token itself
    experts = len(spec.moe_layers) * spec.moe.experts
    sums = experts * (12 * (spec.hidden + spec.moe.expert_width) + 32 * spec.moe.experts)
    streams = 2 * 4 * tokens * spec.hidden if config.profile.mode == "layerwise" else 0
    return int(FORMAT_OVERHEAD * (tokens * record + sums)) + streams


def _gguf_files(budget: BudgetAnswer, config: BuildConfig) -> list[int]:
    """The float16 reference, then the delivered files, the main one first."""
    if "gguf" not in budget.demand.formats:
        return []
    asked = config.export.gguf.types
    further = [name for name in config.target.quantization.gguf if name != budget.quantization]
    names = ["F16", *([budget.quantization, *further] if asked == "auto" else asked)]
    sizes = [_size(budget, Packing("gguf", name)) for name in names]
    limit = budget.space.limits.weights_bytes
    return sizes if limit is None else [*sizes[:2], *(size for size in sizes[2:] if size <= limit)]


def _onnx_files(budget: BudgetAnswer, config: BuildConfig) -> list[int]:
    """The float32 graph of as many layers as fit into memory, then the delivered one."""
    if "onnx" not in budget.demand.formats:
        return []
    options = config.export.onnx
    reference = min(_size(budget, Packing("onnx", "fp32")), int(FP32_GRAPH_SHARE * free_bytes()))
    delivered = _size(budget, Packing("onnx", budget.onnx_precision, options.block_size, options.mix))
    return [reference, delivered, *([delivered] if options.provider == "cuda" else [])]


def _size(budget: BudgetAnswer, packing: Packing) -> int:
    return file_bytes(budget.model, budget.choice.experts, packing, budget.space.width)


def refuse_full_disk(out: Path, needed: Mapping[str, int]) -> str:
    """Compare what is still to be written with the free space; returns the comparison in words.

    Args:
        out: the build's folder, which exists.
        needed: `stage_bytes` of the stages that will run.

    Raises:
        ResourceProblem: there is less.
    """
    missing = {name: max(0, size - bytes_below(out / name)) for name, size in needed.items()}
    total, free = sum(missing.values()), free_disk_bytes(out)
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in missing.items() if size >= 1 << 20)
    text = f"about {format_bytes(total)} will be written ({parts or 'next to nothing'}), {format_bytes(free)} are free"
    if total > free:
        command = "free some space, or choose another --out; what was written so far is kept"
        raise ResourceProblem("not enough disk space", where=str(out), why=text, next_command=command)
    return text


def room_for_build(out: Path, budget: BudgetAnswer, config: BuildConfig, stages: tuple[str, ...]) -> str:
    """`refuse_full_disk` for the stages of a build, and its delivery if it exports."""
    sizes = stage_bytes(budget, config, linked=links_are_possible(out))
    wanted = {*stages, *(("artifacts",) if "export" in stages else ())}
    return refuse_full_disk(out, {name: size for name, size in sizes.items() if name in wanted})
