"""Tensors read and written in pieces are those that the safetensors library reads and writes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_edge.contracts.errors import InputRejected
from moe_edge.storage.checkpoint import INDEX, inspect_checkpoint
from moe_edge.storage.tensor_files import PieceReader, PlannedTensor, write_tensors

TENSORS = {
    "a": torch.arange(35, dtype=torch.bfloat16).view(7, 5),
    "b": torch.randn(3, 2, 4),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "ids": torch.arange(4),
    "half": torch.randn(5).half(),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def test_pieces_make_up_the_tensor(folder: Path) -> None:
    with PieceReader(inspect_checkpoint(folder, require_tokenizer=False)) as reader:
        for name, tensor in TENSORS.items():
            whole = reader.rows(name)
            assert whole.dtype == tensor.dtype and torch.equal(whole, tensor)
            starts, pieces = zip(*reader.pieces(name, 12), strict=True) if tensor.numel() else ((), [tensor])
            assert torch.equal(torch.cat(pieces) if tensor.ndim else pieces[0], tensor)
            assert list(starts) == sorted(set(starts)) and (len(starts) > 1 or tensor.nbytes <= 12)
        assert torch.equal(reader.rows("b", 1, 2), TENSORS["b"][1:2])
        with pytest.raises(InputRejected, match="no such tensor"):
            reader.rows("c")


def test_a_file_cut_off_after_its_header_was_read_is_noticed(folder: Path) -> None:
    headers = inspect_checkpoint(folder, require_tokenizer=False)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    last = max(headers.tensors.values(), key=lambda info: info.offset + info.bytes)
    with PieceReader(headers) as reader, pytest.raises(InputRejected, match="truncated"):
        reader.rows(last.name)


def _planned(name: str) -> PlannedTensor:
    kinds = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64", torch.float16: "F16"}
    return PlannedTensor(name, kinds[TENSORS[name].dtype], tuple(TENSORS[name].shape))


def _halves(tensor: PlannedTensor) -> Iterator[torch.Tensor]:
    yield from TENSORS[tensor.name].flatten().tensor_split(2)


@pytest.mark.parametrize("limit", [10**9, 80])
def test_what_is_written_is_read_by_the_library(tmp_path: Path, limit: int) -> None:
    (tmp_path / "config.json").write_text("{}")
    plan = [_planned(name) for name in TENSORS]
    write_tensors(tmp_path, plan, _halves, limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert inspect_checkpoint(tmp_path, require_tokenizer=False).total_bytes == sum(t.nbytes for t in TENSORS.values())
    if limit == 80:
        assert len(files) > 1
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    written = [path.read_bytes() for path in files]
    write_tensors(tmp_path, plan, _halves, limit)
    assert [path.read_bytes() for path in files] == written


def test_numbers_that_do_not_fill_the_shape_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a: 0 bytes written, 70 planned"):
        write_tensors(tmp_path, [_planned("a")], lambda tensor: iter(()))
