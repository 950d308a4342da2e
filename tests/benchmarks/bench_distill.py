"""What each part of distillation is worth: recovery after pruning, the same token budget for every row; JSON lines and a table.

    python -m tests.benchmarks.bench_distill MODEL --work DIR --tokens 61440 --experts 0.5 --seeds 0 1 2 \\
        [--rows none ce+kl ...] [--evaluate vicuna.jsonl,80 dolly.jsonl,100]

One build up to `compress` serves all rows; then only the distill stage changes. KL and perplexity are measured on held-out
calibration text that nothing has seen, in float32 on the student's checkpoint; seconds and peak memory are the stage's own
(memory only grows within a process, so every row runs in a fresh one). With --evaluate the F16 GGUF of each row answers
instructions (greedy), and ROUGE-L is added.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from moe_edge.compression.routing_health import observe
from moe_edge.metrics.quality import QualityJudge
from moe_edge.models.loading import load_model, load_tokenizer
from moe_edge.models.routing import ROUTER_PATTERN
from moe_edge.models.students import load_student
from moe_edge.storage.files import write_json_atomic
from moe_edge.texts.rows import heldout_rows

Row = dict[str, Any]
ROUTERS_ONLY = [{"pattern": ROUTER_PATTERN, "lr_multiplier": 1.0}, {"pattern": ".*", "lr_multiplier": 0.0}]
BLEND = {"ce": 1.0, "kl": 1.0}
ON_POLICY = {"share": 0.5, "prompt_tokens": 64, "new_tokens": [32, 128]}
REVERSE = {"reverse_kl": 1.0}

# What a stage says besides its name and its length; rates of routers and on-policy rows follow the papers' order of size.
RECIPES: dict[str, Row | None] = {
    "teacher": None,  # measured against itself
    "none": None,
    "router-only kd": {"losses": {"kl": 1.0}, "parameter_lr_multipliers": ROUTERS_ONLY},
    "ce": {"losses": {"ce": 1.0}, "alpha": 0.0},
    "ce+kl": {"losses": BLEND},
    "ce+kl+cka": {"losses": BLEND | {"cka": 0.5}},
    "ce+kl+mse": {"losses": BLEND | {"mse": 0.5}},
    "ce+kl+experts": {"losses": BLEND | {"expert_cka": 0.5}},
    "ce+kl+routing": {"losses": BLEND | {"routing_kl": 0.5}},
    "jsd": {"losses": {"jsd": 1.0}},
    "kl": {"losses": {"kl": 1.0}},
    "kl+cka": {"losses": {"kl": 1.0, "cka": 0.5}},
    "live kl": {"losses": {"kl": 1.0}, "teacher": "live"},
    "live ce+kl+cka": {"losses": BLEND | {"cka": 0.5}, "teacher": "live"},
    "on-policy rkl": {"losses": REVERSE, "on_policy": ON_POLICY},
    "ka": {"losses": REVERSE, "on_policy": ON_POLICY, "teacher_routing": {"policy": "ka"}},
    "sar": {"losses": REVERSE, "on_policy": ON_POLICY, "student_aware_router": {}},
    "all": {"losses": REVERSE, "on_policy": ON_POLICY, "teacher_routing": {"policy": "all"}},
    "sar, every 4": {"losses": REVERSE, "on_policy": ON_POLICY, "student_aware_router": {"every": 4}},
    "sar, every 16": {"losses": REVERSE, "on_policy": ON_POLICY, "student_aware_router": {"every": 16}},
}
EXPERTS_ONLY = [
    {"pattern": r"\.(experts|shared_experts?|shared_mlp)\.|" + ROUTER_PATTERN, "lr_multiplier": 1.0},
    {"pattern": ".*", "lr_multiplier": 0.0},
]
TWO_STAGES = [
    {"stage_name": "experts", "share": 0.5, "parameter_lr_multipliers": EXPERTS_ONLY},
    {"stage_name": "all", "share": 0.5},
]
RECIPES["experts, then all"] = {"stages": TWO_STAGES}
RECIPES |= {
    f"ka, M {draws}, lambda {chance:g}": {
        "losses": REVERSE,
        "on_policy": ON_POLICY,
        "teacher_routing": {"policy": "ka", "draws": draws, "sample_probability": chance},
    }
    for draws in (1, 2, 4)
    for chance in (0.0, 0.05, 0.2)
}


def main() -> None:
    options = _arguments()
    if options.one is not None:
        print(json.dumps(_measure(options, options.one, options.seeds[0])), flush=True)
        return
    rows = list(_lines(options))
    print(_table(rows))


def _lines(options: argparse.Namespace) -> Iterator[Row]:
    """Every row and seed in a process of its own."""
    for name in options.rows:
        for seed in options.seeds[: 1 if RECIPES[name] is None else None]:
            command = [sys.executable, "-m", "tests.benchmarks.bench_distill", *sys.argv[1:]]
            done = subprocess.run([*command, "--one", name, "--seeds", str(seed)], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"the row '{name}' failed: exit {done.returncode}")
            line = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps(line), flush=True)
            yield line


def _measure(options: argparse.Namespace, name: str, seed: int) -> Row:
    from moe_edge.api import build

    line = {"benchmark": "distill", "row": name, "seed": seed, "tokens": options.tokens, "kept": options.experts}
    if name == "teacher":
        line |= {"tokens": 0, "kept": 1.0, "seconds": 0.0, "peak_rss_mib": None}
        return line | _score(options, options.model) | _answers(options, options.model)
    config = options.work / "config.yaml"
    options.work.mkdir(parents=True, exist_ok=True)
    settings: Row = {"plan": {"experts": options.experts, "force": True}}
    settings["distill"] = {"tokens": options.tokens, "seed": seed, "stages": _stages(RECIPES[name], options.rate)}
    write_json_atomic(config, settings)  # JSON is YAML
    out = build(options.model, config=config, out=options.work / "run", settings=options.set, until="distill").out
    manifest = json.loads((out / "distill" / "manifest.json").read_text())
    line |= {"seconds": round(manifest["cost"]["seconds"], 1), "peak_rss_mib": manifest["cost"]["peak_rss_mib"]}
    student = out / "distill" / "model"
    return line | _score(options, student) | _answers(options, student)


def _stages(recipe: Row | None, rate: str) -> list[Row]:
    if recipe is None:
        return []
    stages: list[Row] = recipe.get("stages") or [{"stage_name": "recovery", "share": 1.0} | recipe]
    return [{"learning_rate": rate} | stage for stage in stages]


@torch.inference_mode()
def _score(options: argparse.Namespace, folder: Path) -> Row:
    """KL to the teacher, perplexity and the load entropy of the routers on held-out text."""
    teacher, student = load_model(options.model), load_student(folder)
    held = heldout_rows("default", load_tokenizer(options.model), options.heldout_tokens, 512)
    judge = QualityJudge()
    for ids_S in held.ids_NS:
        ids_1S = torch.from_numpy(ids_S)[None].long()
        judge.add(*(model(ids_1S).logits[0].float().numpy() for model in (teacher, student)), ids_S)
    score, routing = judge.result(), observe(student, torch.from_numpy(held.ids_NS[:4]).long())
    assert score.kl_nats is not None and score.perplexity is not None and routing is not None
    share_LE = routing.counts_LE / routing.counts_LE.sum(-1, keepdim=True)
    return {
        "kl_nats": round(score.kl_nats, 4), "ci95": [round(value, 4) for value in score.kl_nats_ci95 or ()],
        "perplexity": round(score.perplexity, 3),
        "load_entropy": round(float(torch.special.entr(share_LE.double()).sum(-1).mean()), 4),
        "dead_experts": int((routing.counts_LE == 0).sum()),
    }  # fmt: skip


def _answers(options: argparse.Namespace, student: Path) -> Row:
    """ROUGE-L of the F16 GGUF on instructions with its interval, by set and, where rows have one, by category."""
    scores: Row = {}
    if not options.evaluate:
        return scores
    folder, common = options.work / "evaluate", [sys.executable, "-m", "moe_edge"]
    export = ["export", str(student), "--target", "cpu", "--out", str(folder / "export")]
    formats = ["--set", "export.formats=[gguf]", "--set", "export.gguf.types=[F16]", "--set", "export.bundle=false"]
    subprocess.run([*common, *export, *formats], check=True, stdout=subprocess.DEVNULL)
    (file,) = (folder / "export" / "artifacts" / "gguf").glob("*.gguf")
    for given in options.evaluate:
        data, _, limit = given.partition(",")
        asked = ["evaluate", str(file), "--data", data, "--limit", limit or "100", "--greedy", "--json"]
        asked += ["--max-new-tokens", "64", "--out", str(folder / "answers")]
        done = subprocess.run([*common, *asked], check=True, stdout=subprocess.PIPE, text=True)
        name = f"rouge_l_{Path(data).parent.name or Path(data).stem}"
        for found in json.loads(done.stdout)["sets"].values():
            rouge = found["metrics"]["rouge_l"]
            scores |= {name: rouge["value"], f"{name}_ci95": rouge["ci95"]}
            parts = {part: one["metrics"]["rouge_l"]["value"] for part, one in found["categories"].items()}
            scores |= {f"{name}_by_category": parts} if parts else {}
    return scores


def _table(rows: list[Row]) -> str:
    """Mean over seeds, and the standard deviation where there are several."""
    lines = ["| recovery | KL | perplexity | load entropy | dead | seconds | peak MiB |", "|---|" + "---:|" * 6]
    for name in dict.fromkeys(row["row"] for row in rows):
        found = [row for row in rows if row["row"] == name]
        kl = [row["kl_nats"] for row in found]
        spread = f" ± {stdev(kl):.4f}" if len(kl) > 1 else ""
        columns = [mean(row[key] for row in found) for key in ("perplexity", "load_entropy", "dead_experts", "seconds")]
        peak = max(row["peak_rss_mib"] or 0 for row in found)
        cells = [f"{mean(kl):.4f}{spread}", *(f"{value:.3g}" for value in columns), f"{peak:.0f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder of the teacher")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps the build between rows")
    parser.add_argument("--rows", nargs="+", choices=list(RECIPES), default=list(RECIPES)[1:6], metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=61440, help="training tokens of every row")
    parser.add_argument("--experts", type=float, default=0.5, help="share of the experts that is kept")
    parser.add_argument("--rate", default="auto", help="learning rate")
    parser.add_argument("--heldout-tokens", type=int, default=4096)
    parser.add_argument("--evaluate", nargs="*", default=[], metavar="FILE[,LIMIT]", help="instruction sets")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="further settings of the build")
    parser.add_argument("--one", choices=list(RECIPES), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
