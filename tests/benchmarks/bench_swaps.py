"""How well the two predictions of the search order swaps: rank correlation with the masked KL of running every swap.

    python -m tests.benchmarks.bench_swaps MODEL --keep 8 --layers 0 10 20

One JSON line per layer. All swaps of the best criterion's choice are run on the same calibration rows that predict them, so
that this is about the predictions' form, not about their noise. `pick` is what the swap that a prediction likes best does to
the KL, `best` what the best of all does. Shares of the curvature other than the product's are shown beside it.

Shape suffixes: C swaps, R gradients, T tokens, E experts.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from moe_edge.api import build
from moe_edge.families import family_of
from moe_edge.formulas import swaps as formulas
from moe_edge.models.loading import load_model
from moe_edge.planning.candidates import AUTO, Candidates, criteria_to_compare
from moe_edge.planning.local_model import LocalLayer, local_layers
from moe_edge.planning.partial_runs import Meter, TrialRows
from moe_edge.planning.scoring import WholeScorer
from moe_edge.planning.search import ROW_TOKENS, swaps
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.rows import TokenRows
from moe_edge.storage.statistics import Statistics

SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of the curvature


def main() -> None:
    options = _arguments()
    headers = inspect_checkpoint(options.model)
    spec = family_of(headers.config).spec(headers.config)
    with tempfile.TemporaryDirectory(prefix="moe-edge-swaps-") as scratch:
        out = build(options.model, out=options.work or scratch, settings=options.set, until="profile").out
        stats = Statistics.load(out / "profile" / "statistics.safetensors")
        ids_NS = torch.from_numpy(TokenRows.load(out / "profile" / "rows.safetensors").ids_NS).long()
    rows_NS = ids_NS[: max(1, options.tokens // ROW_TOKENS), :ROW_TOKENS]
    model, chosen = load_model(options.model), Candidates(stats, spec.moe_layers, spec.moe.groups)
    sets = {name: chosen.kept(name, options.keep) for name in criteria_to_compare(AUTO, stats)}
    scores = WholeScorer(model).masked_kl(sets, rows_NS)
    start = min(scores, key=lambda name: scores[name].kl_nats)
    meter, generator = Meter(model), torch.Generator().manual_seed(0)
    local = local_layers(
        model, sets[start], rows_NS, top_k=None, residual_scale=spec.residual_scale, generator=generator, meter=meter
    )
    trials = TrialRows(model, rows_NS, None, meter)
    now_T, outputs = trials.run(sets[start])
    trials.adopt(outputs)
    for layer in local:
        if not options.layers or layer.view.index in options.layers:
            line = _line(layer, sets[start], trials, float(now_T.mean()))
            print(
                json.dumps({"benchmark": "swaps", "model": options.model.name, "kept": options.keep} | line), flush=True
            )


def _line(local: LocalLayer, kept: dict[int, list[int]], trials: TrialRows, now: float) -> dict[str, Any]:
    layer, experts = local.view.index, local.view.count
    old = kept[layer]
    sets = swaps(old, old, [expert for expert in range(experts) if expert not in old], experts)
    true_C = torch.tensor([float(trials.run(kept | {layer: ids}, layer)[0].mean()) - now for ids in sets])
    line: dict[str, Any] = {
        "layer": layer,
        "swaps": len(sets),
        "kl_nats": round(now, 4),
        "best": round(float(true_C.min()), 5),
    }
    product = formulas.CURVATURE_SHARE
    for share in SHARES:
        formulas.CURVATURE_SHARE = share
        line[f"pull, curvature x {share:g}"] = _agreement(-local.predict(sets, None).gain, true_C)
    formulas.CURVATURE_SHARE = product
    return line | {"likeness": _agreement(-local.predict(sets, None).likeness, true_C)}


def _agreement(cost_C: Tensor, true_C: Tensor) -> dict[str, float]:
    return {
        "rank_correlation": round(float(spearmanr(cost_C, true_C)[0]), 3),
        "pick": round(float(true_C[cost_C.argmin()]), 5),
        "best_of_4": round(float(true_C[cost_C.argsort()[:4]].min()), 5),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--keep", type=int, required=True, help="experts kept per layer")
    parser.add_argument("--layers", type=int, nargs="*", help="decoder layers; all where not given")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--set", action="append", default=[], help="settings of the profile")
    parser.add_argument("--work", type=Path, help="folder of the profile's build, kept between runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
