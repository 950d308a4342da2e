"""Masked KL of every pruning criterion at several kept-expert counts: one JSON line each, plus one per random seed.

    python tests/benchmarks/bench_criteria.py MODEL --keep 12 10 8

The statistics come from one profile pass over the default calibration recipe; the KL is measured on held-out text,
which the pass did not see. Every line has the model, the counts, the tokens and the 95 % interval over rows.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from moe_edge.compression.masking import masked_kl
from moe_edge.contracts.artifacts import StageContext
from moe_edge.contracts.config_io import resolve_config
from moe_edge.contracts.targets_io import read_target
from moe_edge.families.loading import load_model, load_tokenizer
from moe_edge.formulas.selection import CRITERIA, select
from moe_edge.profiling.calibration import heldout_rows
from moe_edge.stages import profile
from moe_edge.storage.checkpoint import checkpoint_digest
from moe_edge.storage.statistics import Statistics

RANDOM_SEEDS = (0, 1, 2)


def main() -> None:
    options = _arguments()
    with tempfile.TemporaryDirectory(prefix="moe-edge-criteria-") as scratch:
        folder = options.work or Path(scratch)
        stats = _statistics(options, folder)
    rows = heldout_rows(options.text, load_tokenizer(options.model), options.tokens, options.sequence_length)
    ids_NS = torch.from_numpy(rows.ids_NS).long()
    model = load_model(options.model)
    for n_keep in options.keep:
        choices = {name: select(name, stats, n_keep) for name in CRITERIA if name != "random"}
        choices |= {f"random-{seed}": select("random", stats, n_keep, seed) for seed in RANDOM_SEEDS}
        for name, result in masked_kl(model, choices, ids_NS).items():
            line = {
                "benchmark": "criteria",
                "model": options.model.name,
                "experts": stats.counts_LE.shape[1],
                "kept": n_keep,
                "criterion": name,
                "kl_nats": round(result.kl_nats, 4),
                "ci95": [round(value, 4) for value in result.ci95 or ()],
                "tokens": result.n_tokens,
                "profile_tokens": stats.tokens,
            }
            print(json.dumps(line), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--keep", type=int, nargs="+", required=True, help="experts kept per layer")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens")
    parser.add_argument("--profile-tokens", type=int, default=16384)
    parser.add_argument("--cka-tokens", type=int, default=4096)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--text", default="default", help="held-out text: default, or a path")
    parser.add_argument("--work", type=Path, help="folder that keeps the statistics between runs")
    return parser.parse_args()


def _statistics(options: argparse.Namespace, folder: Path) -> Statistics:
    path = folder / "statistics.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        settings = [
            f"calibration.tokens={options.profile_tokens}",
            f"calibration.sequence_length={options.sequence_length}",
            f"profile.cka_tokens={options.cka_tokens}",
        ]
        config = resolve_config(read_target("cpu"), settings=settings)
        profile.run(StageContext(config, options.model, checkpoint_digest(options.model), folder))
    return Statistics.load(path)


if __name__ == "__main__":
    main()
