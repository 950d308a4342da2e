"""The statistics and rows files: what is written comes back, the bytes are deterministic, damage is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_edge.contracts.errors import InputRejected
from moe_edge.storage.rows import TokenRows, row_digest
from moe_edge.storage.statistics import COUNT_FIELDS, TENSOR_FIELDS, Statistics
from moe_edge.storage.tensor_files import load_tensors, save_tensors


def _statistics() -> Statistics:
    generator = torch.Generator().manual_seed(3)
    sizes, tensors = {"L": 2, "E": 3, "D": 4, "G": 1}, {}
    for name in TENSOR_FIELDS:
        shape = [sizes[axis] for axis in name.rpartition("_")[2]]
        tensors[name] = torch.rand(shape, generator=generator, dtype=torch.float64)
    tensors |= {name: (9 * tensors[name]).long() for name in COUNT_FIELDS}
    imatrix = {"attention_in": torch.rand(2, 4, generator=generator), "dense_count": torch.tensor(7.0)}
    meta = {"teacher_digest": "ab", "seed": 0}
    return Statistics(**tensors, cka_tokens=5, tokens=7, imatrix=imatrix, meta=meta)


def test_statistics_round_trip(tmp_path: Path) -> None:
    saved = _statistics()
    saved.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    for name in TENSOR_FIELDS:
        assert torch.equal(getattr(loaded, name), getattr(saved, name))
        assert getattr(loaded, name).dtype == getattr(saved, name).dtype
    assert loaded.imatrix.keys() == saved.imatrix.keys()
    assert torch.equal(loaded.imatrix["attention_in"], saved.imatrix["attention_in"])
    assert (loaded.cka_tokens, loaded.tokens, loaded.meta) == (5, 7, saved.meta)


def test_all_tensor_fields_are_stored() -> None:
    assert len(TENSOR_FIELDS) == 22


def test_equal_statistics_are_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        _statistics().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    _statistics().save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputRejected, match=r"cannot read.*\n.*s\.safetensors"):
        Statistics.load(path)


@pytest.mark.parametrize("missing", [True, False])
def test_a_missing_or_foreign_file_is_refused(tmp_path: Path, missing: bool) -> None:
    if not missing:
        save_tensors(tmp_path / "s", {"x": torch.zeros(1)}, {"schema": "another@1"})
    with pytest.raises(InputRejected):
        Statistics.load(tmp_path / "s")
    with pytest.raises(InputRejected):
        TokenRows.load(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_sum_LE": torch.full((2, 3), torch.nan, dtype=torch.float64)}, "gate_sum_LE holds NaN"),
        ({"out_energy_L": torch.tensor([1.0, torch.inf], dtype=torch.float64)}, "out_energy_L holds NaN or infinity"),
        ({"counts_LE": torch.tensor([[1, 2, 3], [4, 5, -6]])}, "counts_LE holds negative"),
        ({"norm_sum_LE": torch.ones(2, 4, dtype=torch.float64)}, "norm_sum_LE has shape"),
        ({"hsic_LEE": torch.ones(2, 3, dtype=torch.float64)}, "hsic_LEE has shape"),
        ({"counts_LE": torch.ones(2, 3)}, "counts_LE is torch.float32, expected int64"),
        ({"norm_max_LE": torch.ones(2, 3).long()}, "norm_max_LE is torch.int64"),
        ({"imatrix": {"head_in": torch.tensor([-1.0])}}, "head_in holds negative"),
        ({"tokens": -1}, "tokens is -1"),
        ({"cka_tokens": "many"}, "cka_tokens is 'many'"),
        ({"meta": []}, "meta is no mapping"),
    ],
)
def test_numbers_that_no_pass_can_have_counted_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    replace(_statistics(), **change).save(tmp_path / "s")
    with pytest.raises(InputRejected, match=message):
        Statistics.load(tmp_path / "s")


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    _statistics().save(tmp_path / "s")
    tensors, header = load_tensors(tmp_path / "s")
    save_tensors(tmp_path / "s", {name: tensors[name] for name in tensors if name != "counts_LE"}, header)
    with pytest.raises(InputRejected, match="counts_LE missing"):
        Statistics.load(tmp_path / "s")


def test_saving_over_a_loaded_file_leaves_its_tensors_alone(tmp_path: Path) -> None:
    save_tensors(tmp_path / "s", {"x": torch.ones(3)}, {})
    tensors, _ = load_tensors(tmp_path / "s")
    save_tensors(tmp_path / "s", {"x": torch.zeros(3)}, {})
    assert tensors["x"].tolist() == [1, 1, 1]


def test_rows_round_trip_and_know_their_digest(tmp_path: Path) -> None:
    rows = TokenRows(np.arange(12, dtype=np.int32).reshape(3, 4), 12)
    rows.save(tmp_path / "rows")
    loaded = TokenRows.load(tmp_path / "rows")
    assert np.array_equal(loaded.ids_NS, rows.ids_NS) and loaded.ids_NS.dtype == np.int32
    assert (loaded.digest, loaded.n_tokens, loaded.short) == (rows.digest, 12, False)
    assert rows.row_digests()[1] == row_digest(np.array([4, 5, 6, 7]))
    assert len(set(rows.row_digests())) == 3


def test_the_digest_sees_the_shape_and_short_sees_missing_rows() -> None:
    ids = np.arange(12, dtype=np.int32)
    assert TokenRows(ids.reshape(3, 4), 12).digest != TokenRows(ids.reshape(4, 3), 12).digest
    assert TokenRows(ids.reshape(3, 4), 16).short
    assert not TokenRows(ids.reshape(3, 4), 15).short  # a rest that fills no row


def test_changed_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    rows = TokenRows(np.arange(12, dtype=np.int32).reshape(3, 4), 12)
    _, header = (rows.save(path), load_tensors(path))[1]
    save_tensors(path, {"ids_NS": torch.zeros(3, 4, dtype=torch.int32)}, header)
    with pytest.raises(InputRejected, match="changed"):
        TokenRows.load(path)
