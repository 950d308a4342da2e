"""Spilled rows come back as they were, and a file that was not finished is noticed."""

from pathlib import Path

import pytest
import torch

from moe_edge.storage.rows import Spill, is_complete


def test_rows_come_back_by_number(tmp_path: Path) -> None:
    rows = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    with Spill(tmp_path / "s", (3, 4), write=True) as spill:
        spill.append(rows[:2])
        spill.append(rows[2:].bfloat16())
    assert is_complete(tmp_path / "s", 5, (3, 4)) and not is_complete(tmp_path / "s", 6, (3, 4))
    with Spill(tmp_path / "s", (3, 4)) as spill:
        assert torch.equal(spill.rows(3, 5), rows[3:5].bfloat16().float())
        assert torch.equal(spill.rows(0, 2), rows[:2])
        with pytest.raises(EOFError, match="before row 6"):
            spill.rows(4, 6)


def test_another_shape_is_refused_and_writing_begins_anew(tmp_path: Path) -> None:
    for _ in range(2):
        with Spill(tmp_path / "s", (4,), write=True) as spill:
            spill.append(torch.ones(1, 4))
            with pytest.raises(ValueError, match="rows of shape"):
                spill.append(torch.ones(1, 5))
    assert is_complete(tmp_path / "s", 1, (4,)) and not is_complete(tmp_path / "absent", 0, (4,))
