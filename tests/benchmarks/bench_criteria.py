"""KL and perplexity of every criterion and of the search at several kept-expert counts: JSON lines, then a Markdown table.

    python -m tests.benchmarks.bench_criteria MODEL --keep 12 10 8

The statistics come from a build's profile, so that a profile in the cache is used again. As in a plan, the last calibration
rows of the profile compare the criteria, and the search starts from the best one and reads the other rows; KL and perplexity
are measured by masking experts in the teacher on the held-out split of the calibration text, which neither the profile nor
the search has seen. Random choices and the search run with several seeds. Intervals are bootstraps over rows; `gain_ci95` is
that of the paired difference to the best criterion.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_edge.api import build
from moe_edge.contracts.plan import KeptExperts
from moe_edge.contracts.row_split import RowSplit
from moe_edge.contracts.spec import ModelSpec
from moe_edge.families import family_of
from moe_edge.formulas.divergence import cross_entropy, kl_dense
from moe_edge.metrics.quality import bootstrap_ci95
from moe_edge.models.loading import load_model, load_tokenizer
from moe_edge.models.pruning import masked
from moe_edge.planning.candidates import AUTO, Candidates, criteria_to_compare
from moe_edge.planning.scoring import JudgingRows, WholeScorer, distinct_choices, judging_rows
from moe_edge.planning.search import SwapRules, search
from moe_edge.process.progress import track
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.rows import TokenRows
from moe_edge.storage.statistics import Statistics
from moe_edge.texts.rows import heldout_rows

RANDOM_SEEDS = (0, 1, 2)
PLAN_TOKENS = 4096  # plan.tokens
Row = dict[str, Any]


def main() -> None:
    options = _arguments()
    with tempfile.TemporaryDirectory(prefix="moe-edge-criteria-") as scratch:
        rows = list(_lines(options, options.work or Path(scratch)))
    print(_table(rows, options.keep))


def _lines(options: argparse.Namespace, work: Path) -> Iterator[Row]:
    headers = inspect_checkpoint(options.model)
    spec = family_of(headers.config).spec(headers.config)
    stats, rows = _profile(options, work)
    held = heldout_rows(options.text, load_tokenizer(options.model), options.tokens, options.sequence_length)
    judged_NS, model = torch.from_numpy(held.ids_NS).long(), _teacher(options.model)
    for n_keep in options.keep:
        choices, told = _choices(options, spec, stats, model, rows, n_keep)
        scores = score(model, choices, judged_NS)
        best = min(
            (name for name in choices if not name.startswith(("random", "search"))), key=lambda n: scores[n][0].mean()
        )
        for name, (kl_N, nll_N) in scores.items():
            line = {
                "benchmark": "criteria", "model": options.model.name, "experts": spec.moe.experts, "kept": n_keep,
                "criterion": name, "kl_nats": round(float(kl_N.mean()), 4), "ci95": _interval(kl_N),
                "perplexity": round(exp(float(nll_N.mean())), 3), "tokens": judged_NS.numel(),
                "profile_tokens": stats.tokens, "best_criterion": best, "gain_ci95": _interval(scores[best][0] - kl_N),
            }  # fmt: skip
            print(json.dumps(line | told.get(name, {})), flush=True)
            yield line
    teacher_N = score(model, {"teacher": {}}, judged_NS)["teacher"][1]
    print(
        json.dumps({"benchmark": "criteria", "teacher_perplexity": round(exp(float(teacher_N.mean())), 3)}), flush=True
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--keep", type=int, nargs="+", required=True, help="experts kept per layer")
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens that judge")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--text", default="default", help="held-out text: default, or a path")
    parser.add_argument("--search-tokens", type=int, default=100_000, help="plan.search_tokens; 0 = no search")
    parser.add_argument("--search-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--set", action="append", default=[], help="settings of the profile, such as profile.cka_tokens=4096"
    )
    parser.add_argument("--work", type=Path, help="folder of the profile's build, kept between runs")
    return parser.parse_args()


def _profile(options: argparse.Namespace, work: Path) -> tuple[Statistics, JudgingRows]:
    """The statistics, and the rows that they were taken on."""
    settings = [f"calibration.sequence_length={options.sequence_length}", *options.set]
    out = build(options.model, out=work, settings=settings, until="profile").out
    ids_NS = torch.from_numpy(TokenRows.load(out / "profile" / "rows.safetensors").ids_NS)
    rows = judging_rows(ids_NS, RowSplit(*ids_NS.shape), PLAN_TOKENS)
    return Statistics.load(out / "profile" / "statistics.safetensors"), rows


def _teacher(path: Path) -> PreTrainedModel:
    cuda = torch.cuda.is_available()
    model = load_model(path, dtype=torch.bfloat16 if cuda else torch.float32)
    model.to("cuda" if cuda else "cpu")  # type: ignore[arg-type]
    return model


def _choices(
    options: argparse.Namespace,
    spec: ModelSpec,
    stats: Statistics,
    model: PreTrainedModel,
    rows: JudgingRows,
    n_keep: int,
) -> tuple[dict[str, KeptExperts], dict[str, Row]]:
    """Name -> kept experts, and what else there is to tell about some of them."""
    chosen = Candidates(stats, spec.moe_layers, spec.moe.groups)
    starts = {name: chosen.kept(name, n_keep) for name in criteria_to_compare(AUTO, stats) if name != "random"}
    choices, told = dict(starts), dict[str, Row]()
    start = _best(model, starts, rows.judging_NS) if options.search_tokens else ""
    for seed in options.search_seeds if options.search_tokens else ():
        rules, started = SwapRules(None, spec.moe.groups, chosen.guard, spec.residual_scale), time.monotonic()
        found = search(
            model, starts[start], rows.search_NS, budget_tokens=options.search_tokens, rules=rules, seed=seed
        )
        name = f"search-{seed}"
        choices[name] = found.kept
        told[name] = {
            "start": start, "swapped": found.swapped, "sweeps": found.sweeps, "search_tokens": found.tokens,
            "seconds": round(time.monotonic() - started, 1),
        }  # fmt: skip
    for seed in RANDOM_SEEDS:
        seeded = Candidates(stats, spec.moe_layers, spec.moe.groups, seed)
        choices[f"random-{seed}"] = seeded.kept("random", n_keep)
    return choices, told


def _best(model: PreTrainedModel, choices: Mapping[str, KeptExperts], ids_NS: Tensor) -> str:
    results = WholeScorer(model).masked_kl(choices, ids_NS)
    return min(results, key=lambda name: results[name].kl_nats)


@torch.no_grad()
def score(
    model: PreTrainedModel, choices: Mapping[str, KeptExperts], ids_NS: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Per choice (KL to the teacher, negative log-likelihood of the next token), mean of each row [N], nats."""
    distinct, place = distinct_choices(choices)
    rows: list[list[tuple[float, float]]] = [[] for _ in distinct]
    for ids_S in track(ids_NS.to(model.device), "judging"):
        teacher_SV = model(input_ids=ids_S[None], use_cache=False).logits[0, :-1]
        for row, kept in zip(rows, distinct, strict=True):
            with masked(model, kept):
                student_SV = model(input_ids=ids_S[None], use_cache=False).logits[0, :-1]
            kl, nll = kl_dense(teacher_SV, student_SV), cross_entropy(student_SV, ids_S[1:])
            row.append((float(kl.double().mean()), float(nll.double().mean())))
    columns = [torch.tensor(row, dtype=torch.float64).unbind(dim=1) for row in rows]
    return {name: (columns[index][0], columns[index][1]) for name, index in place.items()}


def _interval(values_N: Tensor) -> list[float]:
    """Bootstrap over rows; shifted, because the bootstrap clips at zero and a difference may be negative."""
    shift = max(0.0, -float(values_N.min()))
    found = bootstrap_ci95((values_N + shift).tolist(), [1] * len(values_N))
    return [round(value - shift, 4) for value in found or ()]


def _table(rows: list[Row], counts: list[int]) -> str:
    """Criteria as rows, counts as columns: KL [95 % interval], perplexity."""
    names = list(dict.fromkeys(row["criterion"] for row in rows))
    cells = {(row["criterion"], row["kept"]): row for row in rows}
    names.sort(key=lambda name: cells[name, counts[0]]["kl_nats"])
    lines = [
        "| criterion | " + " | ".join(f"{count} kept" for count in counts) + " |",
        "|---" * (len(counts) + 1) + "|",
    ]
    for name in names:
        texts = []
        for count in counts:
            row = cells[name, count]
            interval = f" [{row['ci95'][0]:.3f}, {row['ci95'][1]:.3f}]" if row["ci95"] else ""
            texts.append(f"{row['kl_nats']:.3f}{interval}, {row['perplexity']:.2f}")
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
