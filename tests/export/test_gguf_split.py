"""Split files: llama.cpp opens the first part and computes the same, and no part is forgotten by anyone who counts."""

from pathlib import Path

import numpy as np
import pytest

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.devices.detect import weight_bytes
from moe_edge.evaluation.cells import model_digest
from moe_edge.export.gguf import write_gguf
from moe_edge.export.gguf_audit import audit
from moe_edge.export.gguf_split import split_gguf
from moe_edge.runtimes.gguf_header import check_gguf_header, parts_of
from moe_edge.runtimes.llama_cpp import LlamaCppRuntime
from tests.export.gguf_models import representable, some_ids

LIMIT = 120_000


def logits(path: Path) -> np.ndarray:
    with LlamaCppRuntime(path, threads=1, context_length=64) as runtime:
        return runtime.logits(some_ids())


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Path, Path]:
    checkpoint = representable(tmp_path, "qwen3_moe")
    path = tmp_path / "tiny-Q8.1.gguf"  # a dot in the name, as in 'Qwen3-0.6B'
    write_gguf(checkpoint, path, name="x")
    return checkpoint, path


def test_llama_cpp_computes_the_same_from_the_parts(whole):
    checkpoint, path = whole
    expected, before = logits(path), check_gguf_header(path)
    parts = split_gguf(path, LIMIT)
    assert len(parts) == 4 and not path.exists() and not list(path.parent.glob("*.tmp"))
    assert [part.name for part in parts][:2] == ["tiny-Q8.1-00001-of-00004.gguf", "tiny-Q8.1-00002-of-00004.gguf"]
    assert all(part.stat().st_size <= LIMIT for part in parts)
    np.testing.assert_array_equal(logits(parts[0]), expected)
    headers = [check_gguf_header(part) for part in parts]
    assert [header.metadata["split.no"] for header in headers] == [0, 1, 2, 3]
    assert [name for header in headers for name in header.tensors] == list(before.tensors)
    assert headers[0].metadata == before.metadata | {
        "split.no": 0,
        "split.count": 4,
        "split.tensors.count": len(before.tensors),
    }
    assert audit(parts, checkpoint, "F16").fallbacks == {}


def test_all_parts_count(whole):
    _, path = whole
    parts = split_gguf(path, LIMIT)
    assert parts_of(parts[0]) == parts and weight_bytes(parts[0]) == sum(part.stat().st_size for part in parts)
    before = model_digest(parts[0])
    data = bytearray(parts[2].read_bytes())
    data[-100] ^= 1
    parts[2].write_bytes(data)
    assert model_digest(parts[0]) != before


def test_a_small_file_stays_whole(whole):
    _, path = whole
    data = path.read_bytes()
    assert split_gguf(path, len(data)) == [path] == parts_of(path) and path.read_bytes() == data


def test_parts_that_are_too_small_are_refused_and_nothing_is_lost(whole):
    _, path = whole
    with pytest.raises(ConfigError, match="too small"):
        split_gguf(path, 20_000)
    assert path.exists() and len(list(path.parent.glob("*.gguf"))) == 1


def test_a_missing_part_and_a_later_part_are_refused(whole):
    _, path = whole
    parts = split_gguf(path, LIMIT)
    with pytest.raises(InputRejected, match="not the first part"):
        logits(parts[1])
    parts[3].unlink()
    with pytest.raises(InputRejected, match="00004-of-00004"):
        logits(parts[0])
