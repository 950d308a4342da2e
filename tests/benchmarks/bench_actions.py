"""KL and perplexity of every action at several kept-expert counts: one JSON line each, a Markdown table at the end.

    python -m tests.benchmarks.bench_actions MODEL --keep 12 10 8 --work DIR

The profile comes from a build (and so from the cache of profiles), the kept experts from its plan: the criterion with the
least masked KL. Every action starts from that plan; dense takes the D-optimal choice. Nothing is trained. KL and perplexity
are measured on held-out calibration text, which neither the profile nor a fit has seen; the interval is over its rows.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from moe_edge.api import build, configure
from moe_edge.compression.layers import Material
from moe_edge.compression.surgery import apply_plan
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import MoeEdgeError
from moe_edge.contracts.plan import Plan
from moe_edge.families import family_of
from moe_edge.metrics.quality import QualityJudge
from moe_edge.models.loading import load_model, load_tokenizer
from moe_edge.planning.document import with_action
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.rows import TokenRows
from moe_edge.storage.statistics import Statistics
from moe_edge.texts.rows import heldout_rows

REFIT, PLAIN = "plan.compensate=true", "plan.compensate=false"
Row = dict[str, Any]


def variants(top_k: int, width: int) -> dict[str, tuple[list[str], int]]:
    """Name of a line -> (settings beside those of the plan, top-k)."""
    fewer, narrow = max(1, top_k // 2), max(32, width * 3 // 4 // 32 * 32)
    return {
        "drop": ([PLAIN], top_k),
        "drop, refitted": ([REFIT], top_k),
        "drop, refitted, sequential": ([REFIT, "plan.sequential=true"], top_k),
        "merge": (["plan.action=merge", PLAIN], top_k),
        "merge, sequential": (["plan.action=merge", PLAIN, "plan.sequential=true"], top_k),
        "merge, refitted": (["plan.action=merge", REFIT], top_k),
        "shared-core": (["plan.action=shared-core"], top_k),
        "dense": (["plan.action=dense", PLAIN], top_k),
        "dense, refitted": (["plan.action=dense", REFIT], top_k),
        f"drop, top-{fewer}": ([PLAIN], fewer),
        f"drop, top-{fewer}, refitted": ([REFIT], fewer),
        f"drop, width {narrow}": ([f"plan.expert_width={narrow}", PLAIN], top_k),
        f"drop, width {narrow}, refitted": ([f"plan.expert_width={narrow}", REFIT], top_k),
    }


def main() -> None:
    options = _arguments()
    with tempfile.TemporaryDirectory(prefix="moe-edge-actions-") as scratch:
        rows = list(_lines(options, options.work or Path(scratch)))
    print(_table(rows))


def _lines(options: argparse.Namespace, work: Path) -> Iterator[Row]:
    headers = inspect_checkpoint(options.model)
    spec = family_of(headers.config).spec(headers.config)
    judged = heldout_rows(options.text, load_tokenizer(options.model), options.tokens, options.sequence_length).ids_NS
    teacher_NSV = list(_logits(load_model(options.model).to(_device()), judged))
    for keep in options.keep:
        plan, config, stats, ids_NS = _planned(options, work, keep)
        for name, (settings, top_k) in variants(spec.moe.top_k, spec.moe.expert_width).items():
            if name in options.skip:
                continue
            started = time.monotonic()
            line = {
                "benchmark": "actions", "model": options.model.name, "experts": plan.experts_total, "kept": keep,
                "criterion": plan.criterion, "action": name, "action_tokens": config.plan.action_tokens,
            }  # fmt: skip
            try:
                changed = with_action(
                    plan,
                    configure("cpu", options.model, settings=_settings(options, keep, settings)),
                    spec,
                    partial(_same, stats),
                )
                changed = changed.model_copy(update={"top_k": top_k})
                applied = apply_plan(load_model(options.model).to(_device()), changed, Material(stats, ids_NS))
                line |= {"seconds": round(time.monotonic() - started, 1)} | _told(applied.pairs, applied.layers)
                line |= _score(teacher_NSV, applied.model.to(_device()), judged)
            except MoeEdgeError as error:  # a family that an action does not know
                line |= {"refused": error.what, "why": error.why}
            print(json.dumps(line), flush=True)
            yield line


def _same(stats: Statistics) -> Statistics:
    return stats


def _planned(options: argparse.Namespace, work: Path, keep: int) -> tuple[Plan, BuildConfig, Statistics, torch.Tensor]:
    run = build(options.model, out=work / f"keep-{keep}", settings=_settings(options, keep, []), until="plan")
    out = run.out
    rows_NS = TokenRows.load(out / "profile" / "rows.safetensors").ids_NS
    plan = Plan.read(out / "plan" / "plan.json")
    if plan.experts_kept != keep:
        raise SystemExit(f"the plan keeps {plan.experts_kept} experts instead of {keep}: {plan.competitor}")
    return (
        plan,
        run.config,
        Statistics.load(out / "profile" / "statistics.safetensors"),
        torch.from_numpy(rows_NS),
    )


def _settings(options: argparse.Namespace, keep: int, settings: list[str]) -> list[str]:
    given = [f"plan.experts={keep}", "plan.force=true", f"calibration.sequence_length={options.sequence_length}"]
    return [*given, *options.set, *settings]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _told(pairs: list[Row], layers: list[Row]) -> Row:
    told: Row = {}
    if pairs:
        told |= {"pairs": len(pairs), "merged": sum(pair["accepted"] for pair in pairs)}
    missed = [record["missed"] for record in layers if "missed" in record]
    if missed:
        told["output_missed"] = round(sum(missed) / len(missed), 4)
    return told


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids_NS: np.ndarray) -> Iterator[np.ndarray]:
    """[S, V] of every row, float32."""
    for ids_S in ids_NS:
        yield model(torch.from_numpy(ids_S)[None].long().to(_device())).logits[0].float().cpu().numpy()


def _score(teacher_NSV: list[np.ndarray], student: PreTrainedModel, ids_NS: np.ndarray) -> Row:
    judge = QualityJudge()
    for teacher_SV, student_SV, ids_S in zip(teacher_NSV, _logits(student, ids_NS), ids_NS, strict=True):
        judge.add(teacher_SV, student_SV, ids_S)
    score = judge.result()
    if score.kl_nats is None:
        return {"refused": "no score", "why": score.reason}
    return {
        "kl_nats": round(score.kl_nats, 4), "ci95": [round(value, 4) for value in score.kl_nats_ci95 or ()],
        "perplexity": None if score.perplexity is None else round(score.perplexity, 3),
        "teacher_perplexity": None if score.reference_perplexity is None else round(score.reference_perplexity, 3),
        "tokens": score.n_tokens, "params": sum(parameter.numel() for parameter in student.parameters()),
    }  # fmt: skip


def _table(rows: list[Row]) -> str:
    """KL (and perplexity) by action and experts kept."""
    counts = list(dict.fromkeys(row["kept"] for row in rows))
    lines = ["| action | " + " | ".join(f"{count} kept: KL (perplexity)" for count in counts) + " |"]
    lines.append("|---|" + "---|" * len(counts))
    for action in dict.fromkeys(row["action"] for row in rows):
        cells = {row["kept"]: row for row in rows if row["action"] == action}
        lines.append(f"| {action} | " + " | ".join(_cell(cells.get(count)) for count in counts) + " |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None or "kl_nats" not in row:
        return "-" if row is None else f"refused: {row['refused']}"
    merged = f", {row['merged']}/{row['pairs']} merged" if "merged" in row else ""
    return f"{row['kl_nats']:.3f} ({row['perplexity']:.2f}){merged}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--keep", type=int, nargs="+", required=True, help="experts kept per layer")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--text", default="default", help="held-out text: default, or a path")
    parser.add_argument("--work", type=Path, help="folder that keeps profile and plans between runs")
    parser.add_argument("--skip", nargs="*", default=[], help="actions to leave out, as named in the table")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings of the build")
    return parser.parse_args()


if __name__ == "__main__":
    main()
