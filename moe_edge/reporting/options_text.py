"""A dry run's answer for people: the choice, the options around it, what they cost and why; one page of plain text."""

from collections.abc import Mapping

from moe_edge.contracts.plan import Plan
from moe_edge.contracts.preview import PlanPreview, PreviewedChoice, PreviewedCriterion, PreviewedOption
from moe_edge.contracts.units import format_bytes


def options_text(preview: PlanPreview) -> str:
    """The whole page."""
    lines = [*_wishes(preview), *_choice(preview.choice)]
    if preview.competitor:
        lines.append(f"rival    {preview.competitor} (priors; the profile measures it)")
    if preview.measured is not None:
        lines += _measured(preview.measured)
    lines += ["", "experts  type      file        KV cache  peak memory  decode"]
    lines += [_option(option, preview.choice) for option in preview.options]
    if len({option.kv_precision for option in preview.options}) > 1:
        lines.append(
            "Rows whose KV caches differ read different bytes per token: compare decode speeds within one precision."
        )
    if preview.shapes:
        lines += ["", "top-k and width are auto, these fit (masked KL decides; the first is shown above):"]
        lines += [_shape(shape) for shape in preview.shapes]
    lines += [_criterion(row) for row in preview.criteria]
    lines += [""] + [f"- {note}" for note in preview.notes]
    return "\n".join(lines).rstrip()


def _wishes(preview: PlanPreview) -> list[str]:
    """What was asked for, and of which model."""
    teacher = preview.teacher
    limits = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in preview.budget.items()
    ]
    return [
        f"target   {preview.target}, budget {', '.join(limits) or 'none'}",
        f"teacher  {teacher.params_total / 1e6:.1f} M parameters ({teacher.params_active / 1e6:.1f} M active), "
        f"{teacher.experts} experts, top-{teacher.top_k}, {format_bytes(teacher.bytes)}",
    ]


def _choice(choice: PreviewedChoice) -> list[str]:
    """What would be planned, and what it is expected to cost."""
    expected = choice.estimate
    return [
        f"choice   {choice.experts_kept} of {choice.experts_total} experts, top-{choice.top_k}{_width(choice.expert_width)}, "
        f"GGUF {choice.quantization}, ONNX {choice.onnx_precision}: {expected.params_total / 1e6:.1f} M parameters "
        f"({expected.params_active / 1e6:.1f} M active)",
        f"         file {format_bytes(expected.file_bytes)}, KV cache {format_bytes(expected.kv_cache_bytes)}, "
        f"peak memory {format_bytes(expected.peak_memory_bytes)}, "
        f"decode {_speed(expected.decode_tokens_per_s)} (estimated)",
        f"context  {expected.context_length} tokens, KV cache in {expected.kv_precision}; "
        f"{_contexts(choice.largest_contexts, choice.context_limit)}",
    ]


def _width(neurons: int | None) -> str:
    return "" if neurons is None else f", {neurons} neurons"


def _speed(tokens_per_s: float | None) -> str:
    return "unknown (no bandwidth in the target)" if tokens_per_s is None else f"{tokens_per_s:.0f} tokens/s"


def _contexts(largest: Mapping[str, int], limit: int) -> str:
    """Up to which lengths the budgets hold."""
    parts = [f"{tokens} in {precision}" for precision, tokens in largest.items()]
    return f"largest that fits: {', '.join(parts) or 'none'} (the model's own limit is {limit})"


def _measured(plan: Plan) -> list[str]:
    """The finished plan of this run."""
    kl = "-" if plan.predicted_kl_nats is None else f"{plan.predicted_kl_nats:.3f} nats"
    bits = plan.quantization_kl_nats.get(plan.main_label)
    cost = "" if bits is None else f", bits {bits:.3f} nats ({plan.quantization_kl_source})"
    experts = f"{plan.experts_kept} of {plan.experts_total} experts{' on average' if plan.uneven else ''}"
    shape = f"top-{plan.top_k}{_width(plan.expert_width)}"
    line = f"measured {experts}, {shape}, {plan.main_label}, by {plan.criterion}: masked KL {kl}{cost}"
    return [line, f"  rival  {plan.competitor}"] if plan.competitor else [line]


def _option(option: PreviewedOption, choice: PreviewedChoice) -> str:
    speed = "-" if option.decode_tokens_per_s is None else f"{option.decode_tokens_per_s:.0f}"
    chosen = option.experts_kept == choice.experts_kept and option.quantization == choice.quantization
    verdict = "<- chosen" if chosen else ("" if option.fits else option.why_not)
    return (
        f"{option.experts_kept:>7}  {option.quantization:<8}  {format_bytes(option.file_bytes):<10}  "
        f"{option.kv_precision:<8}  "
        f"{format_bytes(option.peak_memory_bytes):<11}  {speed:<6}  {verdict}"
    ).rstrip()


def _shape(shape: PreviewedOption) -> str:
    speed = "" if shape.decode_tokens_per_s is None else f", {shape.decode_tokens_per_s:.0f} tokens/s"
    return (
        f"  top-{shape.top_k}{_width(shape.expert_width)}: {shape.experts_kept} experts at {shape.quantization}, "
        f"{format_bytes(shape.file_bytes)}, KV cache in {shape.kv_precision}{speed}"
    )


def _criterion(row: PreviewedCriterion) -> str:
    return f"{row.criterion:<12} keeps experts that carried {row.routed_share_kept:.1%} of the routed tokens"
