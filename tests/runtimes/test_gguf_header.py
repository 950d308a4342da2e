"""Crafted GGUF files are refused quickly, before any parser that trusts them sees them."""

import struct
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.quantization import GGML_TYPES
from moe_edge.exporting.gguf_quantize import quantize_gguf
from moe_edge.runtimes.gguf_header import GGML_TYPE_IDS, check_gguf_header
from moe_edge.runtimes.llama_cpp import LlamaCppRuntime, load_gguf


def header(n_tensors: int = 0, n_keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes = b"t", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HUGE_ARRAY = header(0, 1) + text(b"k") + struct.pack("<IIQ", 9, 8, 2**63)
PADDED = b"\0" * 4096
CRAFTED = {
    "empty": b"",
    "short": b"GGUF",
    "magic": b"GGML" + header()[4:],
    "version": header(version=99),
    "49 bytes, array of 2^63 strings": HUGE_ARRAY,
    "array of 2^62 numbers": header(0, 1) + text(b"k") + struct.pack("<IIQ", 9, 4, 2**62) + PADDED,
    "array of arrays": header(0, 1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1) + PADDED,
    "tensor count": header(n_tensors=2**60) + PADDED,
    "key count": header(n_keys=2**60) + PADDED,
    "keys beyond the end": header(n_keys=1000) + PADDED[:10],
    "string length": header(0, 1) + struct.pack("<Q", 2**63) + PADDED,
    "value type": header(0, 1) + text(b"k") + struct.pack("<I", 77) + PADDED,
    "key twice": header(0, 2) + (text(b"k") + struct.pack("<II", 4, 1)) * 2 + PADDED,
    "alignment": header(0, 1) + text(b"general.alignment") + struct.pack("<II", 4, 3) + PADDED,
    "tensor beyond the end": header(1) + tensor(dims=(2**20,)) + PADDED,
    "tensor offset": header(1) + tensor(offset=64) + PADDED,
    "tensor type": header(1) + tensor(kind=99) + PADDED,
    "tensor dimensions": header(1) + tensor(dims=(1, 1, 1, 1, 1)) + PADDED,
    "tensor size overflow": header(1) + tensor(dims=(2**40, 2**40)) + PADDED,
    "tensor of nothing": header(1) + tensor(dims=(0,)) + PADDED,
    "row does not fit the block": header(1) + tensor(dims=(33,), kind=8) + PADDED,
    "same name twice": header(2) + tensor() + tensor(offset=128) + PADDED,
}


def test_the_known_killer_has_49_bytes():
    assert len(HUGE_ARRAY) == 49


@pytest.mark.parametrize("kind", CRAFTED)
def test_a_crafted_file_is_refused(tmp_path, kind):
    (tmp_path / "x.gguf").write_bytes(CRAFTED[kind])
    with pytest.raises(InputRejected, match=r"x\.gguf"):
        check_gguf_header(tmp_path / "x.gguf")


def test_many_empty_strings_are_bounded(tmp_path):
    """A file that is really full of array elements stops at a limit instead of filling the memory."""
    count = 5_000_000
    (tmp_path / "x.gguf").write_bytes(header(0, 1) + text(b"k") + struct.pack("<IIQ", 9, 8, count) + b"\0" * 8 * count)
    with pytest.raises(InputRejected, match="array elements"):
        check_gguf_header(tmp_path / "x.gguf")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputRejected, match="no GGUF"):
        check_gguf_header(tmp_path / "x.gguf")


def test_random_damage_never_escapes_as_another_error(tmp_path):
    good = written(tmp_path).read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(good)
        for at in generator.integers(0, 400, 3):
            damaged[at] = generator.integers(256)
        (tmp_path / "y.gguf").write_bytes(bytes(damaged[: generator.integers(20, len(good) + 1)]))
        try:
            check_gguf_header(tmp_path / "y.gguf")
        except InputRejected as refused:
            assert "y.gguf" in str(refused)


def written(folder: Path) -> Path:
    writer = GGUFWriter(folder / "x.gguf", "llama")
    writer.add_uint32("a.number", 7)
    writer.add_array("a.list", [1.5, 2.5])
    writer.add_token_list(["x", "ü"])
    writer.add_bool("a.flag", True)
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.ones((4, 32), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "x.gguf"


def test_a_good_file_is_read(tmp_path):
    path = written(tmp_path)
    found = check_gguf_header(path)
    assert found.metadata["a.number"] == 7
    assert found.metadata["a.list"] == [1.5, 2.5]
    assert found.metadata["tokenizer.ggml.tokens"] == ["x", "ü"]
    assert found.metadata["a.flag"] is True
    assert found.tensors["one"].shape == (2, 3)
    assert found.tensors["two"].kind == "F16"
    row = found.tensors["one"]
    raw = path.read_bytes()[found.data_start + row.offset :][: row.bytes]
    assert np.frombuffer(raw, np.float32).tolist() == list(range(6))


def test_types_are_ggmls_and_agree_with_what_we_plan():
    assert {GGML_TYPE_IDS[name]: sizes for name, sizes in GGML_TYPES.items()} == {
        GGML_TYPE_IDS[name]: GGML_QUANT_SIZES[GGMLQuantizationType[name]] for name in GGML_TYPES
    }
    assert GGML_TYPE_IDS["IQ4_XS"] == 23  # a file of another maker


@pytest.mark.parametrize(
    "open_it",
    [
        load_gguf,
        lambda path: LlamaCppRuntime(path, 1, 16),
        lambda path: quantize_gguf(path, path.with_name("q.gguf"), "Q8_0", None, 1),
    ],
)
def test_every_way_to_open_a_gguf_checks_the_header_first(tmp_path, open_it):
    """gguf's own reader would hang on these 49 bytes."""
    (tmp_path / "x.gguf").write_bytes(HUGE_ARRAY)
    started = time.monotonic()
    with pytest.raises(InputRejected, match=r"array of 9223372036854775808"):
        open_it(tmp_path / "x.gguf")
    assert time.monotonic() - started < 2


def test_no_module_opens_a_gguf_past_the_check():
    """gguf.GGUFReader and llama_cpp.Llama trust the file; only load_gguf may call libllama's loader."""
    import ast

    import moe_edge

    package = Path(moe_edge.__file__).parent
    callers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name | ast.Attribute)
        and (node.id if isinstance(node, ast.Name) else node.attr)
        in ("GGUFReader", "Llama", "llama_model_load_from_file", "llama_load_model_from_file")
    }
    assert callers == {"runtimes/llama_cpp.py", "exporting/device_runner.py"}
