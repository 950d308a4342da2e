"""Candidates by decoder layer: dense layers in between, groups, the guard and what is said about the evidence."""

from dataclasses import replace

import pytest
import torch

from moe_edge.contracts.errors import ConfigError
from moe_edge.formulas.selection import CRITERIA, NEEDS_EVIDENCE_BLOCKS
from moe_edge.planning.candidates import Candidates, criteria_to_compare
from tests.stages.inputs import EXPERTS, plain_statistics


@pytest.fixture
def stats():
    """Two MoE layers of eight experts; expert 0 is used most and expert 7 least; 7 of the first layer is super."""
    largest = torch.ones(2, EXPERTS, dtype=torch.float64)
    largest[0, 7] = 100.0
    return replace(plain_statistics(), norm_max_LE=largest)


def test_positions_become_decoder_layers(stats):
    """The second decoder layer is dense."""
    chosen = Candidates(stats, (0, 2), guarded=False)
    assert chosen.kept("frequency", 3) == {0: [0, 1, 2], 2: [0, 1, 2]} and chosen.guard == {}
    assert Candidates(stats, (0, 2), groups=2, guarded=False).kept("frequency", 4)[2] == [0, 1, 4, 5]


def test_super_experts_stay_and_are_named(stats):
    chosen = Candidates(stats, (3, 5))
    assert chosen.kept("frequency", 3) == {3: [0, 1, 7], 5: [0, 1, 2]} and chosen.guard == {3: [7]}
    assert "layer 3: 7" in chosen.notes()[0]
    assert chosen.kept("random", 3) == Candidates(stats, (3, 5), guarded=False).kept("random", 3)


def test_experts_without_evidence_are_counted(stats):
    counts = stats.counts_LE.clone()
    counts[1, 2:4] = 0
    notes = Candidates(replace(stats, counts_LE=counts), (0, 1)).notes()
    assert any(note.startswith("2 experts saw no token") for note in notes)
    assert not any("no token" in note for note in Candidates(stats, (0, 1)).notes())


def test_the_criteria_that_are_compared(stats):
    assert criteria_to_compare("auto", stats) == list(CRITERIA)
    assert criteria_to_compare("ean", stats) == ["ean", "random"]
    assert criteria_to_compare("random", stats) == ["random"]
    without = replace(stats, cka_tokens=0)
    assert set(criteria_to_compare("auto", without)) == set(CRITERIA) - set(NEEDS_EVIDENCE_BLOCKS)
    with pytest.raises(ConfigError, match="loo-mse needs a profile with CKA"):
        criteria_to_compare("loo-mse", without)
