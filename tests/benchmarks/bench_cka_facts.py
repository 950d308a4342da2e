"""What CKA says where the answer is known: debiased, and the plug-in estimate beside it, which shows why. One JSON line each.

    python -m tests.benchmarks.bench_cka_facts

Feature maps are Gaussian with 512 columns; "planted" profiles a tiny random model in which experts 4..7 are neuron-permuted
copies of 0..3 and masks what each criterion would drop. Seconds on one core.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_edge.formulas.cka import cka_from_hsic, hsic_all_pairs, normalise_rows, sink_mask
from moe_edge.formulas.selection import CRITERIA, expert_cka, select
from moe_edge.planning.scoring import WholeScorer
from moe_edge.profiling.passes import run_pass, share_of
from moe_edge.profiling.sums import to_statistics
from tests.compression.action_helpers import PAIRS, planted
from tests.tiny import tiny_ids

D, BLOCK = 512, 256


def biased(features_2ND: Tensor) -> float:
    """Linear CKA as Kornblith et al. 2019 define it: centred Gram matrices with their diagonal."""
    centred = (features_2ND - features_2ND.mean(dim=1, keepdim=True)).double()
    cross, own, other = (torch.linalg.matrix_norm(centred[i].T @ centred[j]) ** 2 for i, j in ((0, 1), (0, 0), (1, 1)))
    return float(cross / (own * other).sqrt())


def debiased(features_2ND: Tensor, block: int | None = None) -> float:
    """The product's estimate, in blocks whose HSIC is summed before it is divided."""
    parts = features_2ND.split(block or features_2ND.shape[1], dim=1)
    return float(cka_from_hsic(torch.stack([hsic_all_pairs(part) for part in parts]).sum(dim=0))[0, 1])


def maps(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(2, tokens, D, generator=torch.Generator().manual_seed(seed))


def facts() -> Iterator[dict[str, Any]]:
    """(fact, expected, debiased, biased) of every known case."""
    for tokens in (64, 256, 512, 1024, 2048, 4096):
        pair = normalise_rows(maps(tokens))
        yield {
            "fact": f"independent, {tokens} tokens",
            "expected": 0.0,
            "debiased": debiased(pair),
            "biased": biased(pair),
        }
    rotation = torch.linalg.qr(maps(D, seed=1)[0]).Q
    pair = torch.stack([maps(1024)[0], 3.7 * maps(1024)[0] @ rotation])
    pair = normalise_rows(pair)
    yield {
        "fact": "rotated and scaled, 1024 tokens",
        "expected": 1.0,
        "debiased": debiased(pair),
        "biased": biased(pair),
    }
    yield from _sinks()
    shared, own = maps(4096, seed=2)
    pair = normalise_rows(torch.stack([shared + own, shared + maps(4096, seed=3)[0]]))
    full = debiased(pair)
    yield {"fact": "shared signal, 4096 tokens at once", "expected": full, "debiased": full, "biased": biased(pair)}
    in_blocks = sum(biased(part) for part in pair.split(BLOCK, dim=1)) * BLOCK / pair.shape[1]
    yield {
        "fact": f"the same in blocks of {BLOCK}", "expected": full, "debiased": debiased(pair, BLOCK), "biased": in_blocks,
    }  # fmt: skip


def _sinks() -> Iterator[dict[str, Any]]:
    """Two sink tokens in 1024: independent features plus one massive direction that both share."""
    pair, hidden = maps(1024, seed=4), maps(1024, seed=5)[0]
    massive = 500 * maps(1, seed=6)[0, 0]
    pair[:, [0, 400]] += massive
    hidden[[0, 400]] += massive
    clean = pair[:, ~sink_mask(hidden, torch.arange(1024))]
    for name, kept in (("two sinks in 1024 tokens", pair), ("the same, masked", clean)):
        yield {"fact": name, "expected": 0.0, "debiased": debiased(kept), "biased": biased(kept)}
    rows = normalise_rows(clean)
    yield {
        "fact": "the same, masked and normalised",
        "expected": 0.0,
        "debiased": debiased(rows),
        "biased": biased(rows),
    }


def planted_facts() -> Iterator[dict[str, Any]]:
    """CKA of the planted pairs and of all others; KL of keeping 4 of 8 experts at top-2 under every criterion."""
    model, ids = planted("permuted"), tiny_ids(64, 8)
    with tempfile.TemporaryDirectory() as folder:
        sums = run_pass(model, share_of(ids.int().numpy(), ids.numel()), partial=Path(folder), identity={})
    stats = to_statistics(sums, {})
    cka_LEE = expert_cka(stats)
    pair = torch.zeros(2 * PAIRS, 2 * PAIRS, dtype=torch.bool)
    pair[range(PAIRS), range(PAIRS, 2 * PAIRS)] = True
    other = torch.ones_like(pair).triu(1) & ~pair
    yield {"fact": "planted pairs, least CKA", "debiased": float(cka_LEE[:, pair].min())}
    yield {"fact": "all other pairs, largest CKA", "debiased": float(cka_LEE[:, other].max())}
    choices = {name: select(name, stats, PAIRS) for name in CRITERIA}
    choices |= {f"random-{seed}": select("random", stats, PAIRS, seed) for seed in (1, 2)}
    for name, result in WholeScorer(model).masked_kl(choices, tiny_ids(64, 8, seed=9), top_k=2).items():
        whole = all(len({expert % PAIRS for expert in kept}) == PAIRS for kept in choices[name].values())
        yield {"fact": f"planted, {name}", "one_of_each_pair": whole, "kl_nats": result.kl_nats}


def main() -> None:
    for line in (*facts(), *planted_facts()):
        rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in line.items()}
        print(json.dumps({"benchmark": "cka-facts"} | rounded), flush=True)


if __name__ == "__main__":
    main()
