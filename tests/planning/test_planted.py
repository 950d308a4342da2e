"""Planted redundancy, from the profile pass to the pruned model: CKA sees the copies, and diversity keeps one of each.

Experts 4..7 are neuron-permuted copies of 0..3 with the same router rows, so that half of the experts, at half the top-k,
are the whole teacher.
"""

import pytest

from moe_edge.formulas.cka import cka_from_hsic
from moe_edge.formulas.selection import expert_cka, select
from moe_edge.planning.scoring import WholeScorer
from moe_edge.profiling.passes import run_pass, share_of
from moe_edge.profiling.sums import to_statistics
from tests.compression.action_helpers import PAIRS, planted
from tests.tiny import tiny_ids

ROWS, TOKENS = 8, 64


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    model, ids = planted("permuted"), tiny_ids(TOKENS, ROWS)
    work = share_of(ids.int().numpy(), ROWS * TOKENS)
    sums = run_pass(model, work, partial=tmp_path_factory.mktemp("partial"), identity={})
    return model, to_statistics(sums, {})


@pytest.mark.parametrize("view", ["functional", "gated"])
def test_every_planted_pair_stands_out(profiled, view):
    _, stats = profiled
    cka_LEE = expert_cka(stats) if view == "gated" else cka_from_hsic(stats.hsic_LEE)
    for cka_EE in cka_LEE:
        pairs = cka_EE[range(PAIRS), range(PAIRS, 2 * PAIRS)]
        other = cka_EE.triu(1)
        other[range(PAIRS), range(PAIRS, 2 * PAIRS)] = 0
        assert float(pairs.min()) > 0.98
        assert float(other.max()) < float(pairs.min()) - 0.1


@pytest.mark.parametrize("criterion", ["cka-diverse", "cka-dopt"])
def test_diversity_keeps_one_of_each_pair_and_half_the_model_is_the_teacher(profiled, criterion):
    model, stats = profiled
    kept = select(criterion, stats, PAIRS)
    for ids in kept.values():
        assert sorted(expert % PAIRS for expert in ids) == list(range(PAIRS))
    choices = {criterion: kept, "msan": select("msan", stats, PAIRS), "random": select("random", stats, PAIRS, 1)}
    found = WholeScorer(model).masked_kl(choices, tiny_ids(TOKENS, 4, seed=9), top_k=2)
    assert found[criterion].kl_nats < 1e-3
    assert found["msan"].kl_nats > 0.01 and found["random"].kl_nats > 0.01
