"""A dry run's answer for humans: the choice, the options around it, what they cost and why."""

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
        f"choice   {choice['experts_kept']} of {choice['experts_total']} experts, top-{choice['top_k']}, "
        f"GGUF {choice['quantization']}, ONNX {choice['onnx_precision']}: {expected['params_total'] / 1e6:.1f} M parameters "
        f"({expected['params_active'] / 1e6:.1f} M active)",
        f"         file {format_bytes(expected['file_bytes'])}, KV cache {format_bytes(expected['kv_cache_bytes'])}, "
        f"peak memory {format_bytes(expected['peak_memory_bytes'])}, "
        f"decode {_speed(expected['decode_tokens_per_s'])} (estimated)",
    ]
    if plan["competitor"]:
        lines.append(f"rival    {plan['competitor']}")
    lines += ["", "experts  type      file        peak memory  decode"]
    lines += [_row(option, choice) for option in plan["options"]]
    lines += [_preview(row) for row in plan["criteria"]]
    lines += [""] + [f"- {note}" for note in plan["notes"]]
    return "\n".join(lines).rstrip()


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
