"""What judges candidates: the last rows, and a random choice beside them."""

import torch

from moe_edge.contracts.row_split import RowSplit
from moe_edge.planning.judging import random_choice_notes
from moe_edge.planning.scoring import MaskedKl, first_rows, judging_rows


def test_the_last_rows_judge_and_the_search_reads_the_others():
    rows = judging_rows(torch.arange(60).view(6, 10), RowSplit(6, 10), tokens=25)
    assert rows.judging_NS[:, 0].tolist() == [40, 50] and rows.search_NS[:, 0].tolist() == [0, 10, 20, 30]
    assert "rows 4..5 of 6 (20 tokens)" in rows.note
    assert len(judging_rows(torch.zeros(2, 10), RowSplit(2, 10), tokens=1).judging_NS) == 1, "at least one"


def test_rows_are_whole_and_never_none():
    ids = torch.zeros(4, 16)
    assert len(first_rows(ids, 33)) == 2 and len(first_rows(ids, 3)) == 1 and len(first_rows(ids, 1000)) == 4


def test_a_choice_no_better_than_chance_is_called_that():
    results = {
        "ean": MaskedKl(1.0, None, 4, (1.0, 1.0)),
        "random": MaskedKl(1.0, None, 4, (0.9, 1.1)),
    }
    assert "not clearly better than a random choice" in random_choice_notes("ean", results)[0]
    assert "random choice did best" in random_choice_notes("random", results)[0]
    results["random"] = MaskedKl(2.0, None, 4, (2.1, 1.9))
    assert random_choice_notes("ean", results) == []
