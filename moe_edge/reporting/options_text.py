"""A dry run's answer for humans: the choice, the options around it, what they cost and why.

Before a profile exists, expected KLs are priors; the plan of a finished run is shown beside them with its measured ones.
"""

from typing import Any

from moe_edge.contracts.units import format_bytes


def options_text(plan: dict[str, Any]) -> str:
    """The dictionary of `stages.plan.dry_run` as a page of text."""
    choice, teacher = plan["choice"], plan["teacher"]
    expected = choice["estimate"]
    lines = [
        f"target   {plan['target']}, budget {_budget(plan['budget'])}",
        f"teacher  {teacher['params_total'] / 1e6:.1f} M parameters ({teacher['params_active'] / 1e6:.1f} M active), "
        f"{teacher['experts']} experts, top-{teacher['top_k']}, {format_bytes(teacher['bytes'])}",
        f"choice   {choice['experts_kept']} of {choice['experts_total']} experts, top-{choice['top_k']}{_width(choice)}, "
        f"GGUF {choice['quantization']}, ONNX {choice['onnx_precision']}: {expected['params_total'] / 1e6:.1f} M parameters "
        f"({expected['params_active'] / 1e6:.1f} M active)",
        f"         file {format_bytes(expected['file_bytes'])}, KV cache {format_bytes(expected['kv_cache_bytes'])}, "
        f"peak memory {format_bytes(expected['peak_memory_bytes'])}, "
        f"decode {_speed(expected['decode_tokens_per_s'])} (estimated)",
        f"context  {expected['context_length']} tokens, KV cache in {expected['kv_precision']}; "
        f"{_contexts(choice['largest_contexts'], choice['context_limit'])}",
    ]
    if plan["competitor"]:
        lines.append(f"rival    {plan['competitor']} (priors; the profile measures it)")
    lines += _measured(plan["measured"]) if plan["measured"] else []
    lines += ["", "experts  type      file        peak memory  decode"]
    lines += [_row(option, choice) for option in plan["options"]]
    if plan["shapes"]:
        lines += ["", "top-k and width are auto, these fit (masked KL decides; the first is shown above):"]
        lines += [_shape(row) for row in plan["shapes"]]
    lines += [_preview(row) for row in plan["criteria"]]
    lines += [""] + [f"- {note}" for note in plan["notes"]]
    return "\n".join(lines).rstrip()


def _width(choice: dict[str, Any]) -> str:
    return "" if choice["expert_width"] is None else f", {choice['expert_width']} neurons"


def _contexts(largest: dict[str, int], limit: int) -> str:
    """Up to which lengths the budgets hold."""
    parts = [f"{tokens} in {precision}" for precision, tokens in largest.items()]
    return f"largest that fits: {', '.join(parts) or 'none'} (the model's own limit is {limit})"


def _measured(plan: dict[str, Any]) -> list[str]:
    """The finished plan of this run."""
    kl = "-" if plan["predicted_kl_nats"] is None else f"{plan['predicted_kl_nats']:.3f} nats"
    label = plan["quantization"] + ("-mix" if plan["quantization_by_class"] else "")
    bits = plan["quantization_kl_nats"].get(label)
    cost = "" if bits is None else f", bits {bits:.3f} nats ({plan['quantization_kl_source']})"
    experts = f"{plan['experts_kept']} of {plan['experts_total']} experts{' on average' if plan['uneven'] else ''}"
    lines = [
        f"measured {experts}, top-{plan['top_k']}{_width(plan)}, {label}, by {plan['criterion']}: masked KL {kl}{cost}"
    ]
    return [*lines, f"  rival  {plan['competitor']}"] if plan["competitor"] else lines


def _shape(row: dict[str, Any]) -> str:
    speed = row["decode_tokens_per_s"]
    return (
        f"  top-{row['top_k']}{_width(row)}: {row['experts_kept']} experts at {row['quantization']}, "
        f"{format_bytes(row['file_bytes'])}" + ("" if speed is None else f", {speed:.0f} tokens/s")
    )


def _budget(budget: dict[str, Any]) -> str:
    return (
        ", ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in budget.items()
        )
        or "none"
    )


def _speed(tokens_per_s: float | None) -> str:
    return "unknown (no bandwidth in the target)" if tokens_per_s is None else f"{tokens_per_s:.0f} tokens/s"


def _row(option: dict[str, Any], choice: dict[str, Any]) -> str:
    speed = option["decode_tokens_per_s"]
    chosen = option["experts_kept"] == choice["experts_kept"] and option["quantization"] == choice["quantization"]
    verdict = "<- chosen" if chosen else ("" if option["fits"] else option["why_not"])
    return (
        f"{option['experts_kept']:>7}  {option['quantization']:<8}  {format_bytes(option['file_bytes']):<10}  "
        f"{format_bytes(option['peak_memory_bytes']):<11}  {'-' if speed is None else f'{speed:.0f}':<6}  {verdict}"
    ).rstrip()


def _preview(row: dict[str, Any]) -> str:
    return f"{row['criterion']:<12} keeps experts that carried {row['routed_share_kept']:.1%} of the routed tokens"
