"""Kinds of artifacts by content."""

from pathlib import Path

import pytest

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.devices.detect import GGUF, HF, ONNX, detect, weight_bytes


def test_content_decides(tmp_path: Path) -> None:
    gguf, onnx, hf = tmp_path / "model.bin", tmp_path / "onnx", tmp_path / "hf"
    gguf.write_bytes(b"GGUF" + bytes(20))
    onnx.mkdir()
    (onnx / "model.onnx").write_bytes(bytes(7))
    (onnx / "model.onnx.data").write_bytes(bytes(100))
    (onnx / "tokenizer.json").write_bytes(bytes(9))
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    for shard in range(2):
        (hf / f"model-{shard}.safetensors").write_bytes(bytes(50))
    assert [detect(path) for path in (gguf, onnx, hf)] == [GGUF, ONNX, HF]
    assert [weight_bytes(path) for path in (gguf, onnx, hf)] == [24, 107, 100]


def test_a_name_alone_does_not_count(tmp_path: Path) -> None:
    liar, empty, pickled = tmp_path / "x.gguf", tmp_path / "empty", tmp_path / "pickled"
    liar.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    empty.mkdir()
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(bytes(9))
    for path in (liar, empty, pickled):
        with pytest.raises(InputRejected, match="not a model"):
            detect(path)


def test_nothing_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such artifact"):
        detect(tmp_path / "absent.gguf")
