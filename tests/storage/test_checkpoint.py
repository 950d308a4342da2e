"""A checkpoint folder from anywhere: every defect is refused from the headers alone, with the file named."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.storage.checkpoint import (
    TensorReader,
    checkpoint_digest,
    inspect_checkpoint,
    sha256_of_finite,
    tokenizer_files,
)
from moe_edge.storage.files import sha256_file
from tests.storage.hostile import (
    CONFIG,
    DATA,
    HEADER,
    LFS_POINTER,
    safetensors_bytes,
    shard_header,
    write_folder,
    write_sharded,
)


def refused(folder: Path, *words: str) -> None:
    """inspect_checkpoint rejects with exit code 4 and a message that holds all words."""
    with pytest.raises(InputRejected) as caught:
        inspect_checkpoint(folder)
    assert caught.value.exit_code == 4
    for word in words:
        assert word in str(caught.value)


def test_a_valid_folder_is_described(tmp_path: Path) -> None:
    headers = inspect_checkpoint(write_folder(tmp_path))
    assert headers.config == CONFIG
    assert list(headers.tensors) == ["a", "b"]
    info = headers.tensors["a"]
    assert (info.file, info.dtype, info.shape, info.bytes) == ("model.safetensors", "F32", (2, 3), 24)
    assert headers.total_bytes == 32


def test_shards_are_joined(tmp_path: Path) -> None:
    headers = inspect_checkpoint(write_sharded(tmp_path))
    assert {name: info.file[:11] for name, info in headers.tensors.items()} == {"x": "model-00001", "y": "model-00002"}


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        inspect_checkpoint(tmp_path / "none")
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigError):
        inspect_checkpoint(write_folder(tmp_path) / "config.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("config.json", "missing")),
        (LFS_POINTER, ("config.json", "Git-LFS", "git lfs pull")),
        (b"{", ("config.json", "parsed")),
        (b"\xff\xfe", ("config.json", "parsed")),
        (b"[" * 100_000, ("config.json", "parsed")),
        (b"[1]", ("config.json", "object")),
        (b'{"a": ' + b"[" * 900 + b'{"auto_map": 1}' + b"]" * 900 + b"}", ("auto_map",)),
        (b'{"auto_map": {"AutoConfig": "evil.Config"}}', ("auto_map",)),
        (b'{"text_config": {"auto_map": {}}}', ("auto_map",)),
        (b'{"_attn_implementation_internal": "evil/kernel"}', ("_attn_implementation_internal",)),
        (b'{"sub": [{"attn_implementation": "evil/kernel"}]}', ("attn_implementation", "evil/kernel")),
        (b'{"_experts_implementation": "evil/kernel"}', ("_experts_implementation",)),
    ],
)
def test_bad_config(tmp_path: Path, content: bytes | None, words: tuple[str, ...]) -> None:
    refused(write_folder(tmp_path, config__json=content), *words)


def test_a_backend_of_transformers_itself_is_fine(tmp_path: Path) -> None:
    config = CONFIG | {"_attn_implementation": "sdpa", "attn_implementation": None}
    headers = inspect_checkpoint(write_folder(tmp_path, config__json=json.dumps(config).encode()))
    assert headers.config["_attn_implementation"] == "sdpa"


def test_a_huge_config_is_not_parsed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    with (folder / "config.json").open("r+b") as file:
        file.truncate(65 * 2**20)
    refused(folder, "too large")


def header_with(**changes: object) -> dict[str, object]:
    return HEADER | {"a": HEADER["a"] | changes}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LFS_POINTER, ("Git-LFS",)),
        (b"", ("truncated", "0 bytes")),
        (safetensors_bytes(HEADER)[:40], ("truncated",)),
        (safetensors_bytes(HEADER)[:-1], ("truncated", "32", "31")),
        (safetensors_bytes(HEADER, DATA + b"x"), ("too long", "33")),
        (safetensors_bytes(HEADER, length=2**63), ("not a valid", "9223372036854775808", "limit 100000000")),
        (safetensors_bytes(b"not json"), ("not JSON",)),
        (safetensors_bytes(b"[]", b""), ("not an object",)),
        (safetensors_bytes(b'{"a": 1, "a": 2}'), ("duplicate",)),
        (safetensors_bytes({"a": 1}), ("bad entry",)),
        (safetensors_bytes(header_with(dtype="F4")), ("tensor a", "F4")),
        (safetensors_bytes(header_with(dtype=["F32"])), ("bad entry",)),
        (safetensors_bytes(header_with(shape=[2, -3])), ("tensor a", "non-negative")),
        (safetensors_bytes(header_with(shape=[2, 3.0])), ("tensor a", "integers")),
        (safetensors_bytes(header_with(shape=[2, True])), ("tensor a", "integers")),
        (safetensors_bytes(header_with(shape=[1] * 100_000)), ("tensor a", "few")),
        (safetensors_bytes(header_with(shape=[2, 4])), ("needs 32 bytes", "give 24")),
        (safetensors_bytes(header_with(data_offsets=[0, 24, 3])), ("bad entry",)),
        (safetensors_bytes(header_with(data_offsets=[8, 32])), ("leave a hole",)),
        (safetensors_bytes(HEADER | {"c": {"dtype": "U8", "shape": [16], "data_offsets": [16, 32]}}), ("overlap",)),
    ],
)
def test_bad_weights(tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
    refused(write_folder(tmp_path, model__safetensors=content), "model.safetensors", *words)


@pytest.mark.parametrize(
    "entry", [b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', b'"%d":[[],[],[],[],[],[]],']
)
def test_a_header_of_too_many_tensors_is_not_parsed(tmp_path: Path, entry: bytes) -> None:
    raw = b"{" + b"".join(entry % number for number in range(300_000))[:-1] + b"}"
    folder = write_folder(tmp_path, model__safetensors=safetensors_bytes(raw, b""))
    started = time.monotonic()
    refused(folder, "limit 262144")
    assert time.monotonic() - started < 2


def test_a_header_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, model__safetensors=safetensors_bytes(HEADER, length=100_000_001))
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100_001_000)
    refused(folder, "header of 100000001 bytes", "limit 100000000")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path, model__safetensors=None)
    (folder / name).write_bytes(b"\x80\x04cos\nsystem\n")
    refused(folder, name, "pickle", "save_pretrained")


def test_no_weights_at_all(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, model__safetensors=None)
    (folder / "model.safetensors").mkdir()
    refused(folder, "no weights")


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "c:x.safetensors", ".x.safetensors", "x.bin", 7],
)
def test_an_index_cannot_leave_the_folder(tmp_path: Path, shard: object) -> None:
    folder = write_sharded(tmp_path / "inner", {"x": shard})
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(shard_header("x"), bytes(8)))
    refused(folder, "index", "outside the folder")


@pytest.mark.parametrize("weight_map", [{}, [], "x"])
def test_an_index_without_names(tmp_path: Path, weight_map: object) -> None:
    refused(write_sharded(tmp_path, weight_map), "no weight_map")  # type: ignore[arg-type]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "shard is missing", "model-00002-of-00002.safetensors")


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    refused(folder, "truncated", shard.name, "describes 8 bytes", "has 5")


@pytest.mark.parametrize("extra", ["first", "ghost"])
def test_index_and_shards_must_agree(tmp_path: Path, extra: str) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    weight_map = {"x": first, "y": second, "ghost": first} if extra == "ghost" else {"y": second, "x": second}
    refused(write_sharded(tmp_path, weight_map), "disagree")


def test_a_tensor_that_the_index_forgets(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path)
    two = shard_header("y") | {"z": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}
    (folder / "model-00002-of-00002.safetensors").write_bytes(safetensors_bytes(two, bytes(12)))
    refused(folder, "disagree", "z")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer__json": None}, ("tokenizer is missing", "merges.txt")),
        ({"tokenizer__json": None, "vocab__json": b"{}"}, ("tokenizer is missing",)),
        ({"tokenizer__json": LFS_POINTER}, ("tokenizer.json", "Git-LFS")),
        ({"tokenizer_config__json": b"{"}, ("tokenizer_config.json", "parsed")),
        ({"tokenizer_config__json": b'{"auto_map": {"AutoTokenizer": ["evil.Tok", null]}}'}, ("auto_map",)),
    ],
)
def test_bad_tokenizer(tmp_path: Path, files: dict[str, bytes | None], words: tuple[str, ...]) -> None:
    refused(write_folder(tmp_path, **files), *words)


@pytest.mark.parametrize("files", [("tokenizer.model",), ("vocab.json", "merges.txt")])
def test_other_tokenizers_count(tmp_path: Path, files: tuple[str, ...]) -> None:
    folder = write_folder(tmp_path, tokenizer__json=None)
    for name in files:
        (folder / name).write_bytes(b"x")
    assert inspect_checkpoint(folder).tensors
    assert [path.name for path in tokenizer_files(folder)] == list(files)


def test_the_tokenizer_can_be_left_out(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tokenizer__json=None)
    assert inspect_checkpoint(folder, require_tokenizer=False).total_bytes == 32


def test_reader_gives_the_saved_tensors(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.zeros(0)}
    save_file(tensors, folder / "model.safetensors")
    reader = TensorReader(folder)
    assert sorted(reader.names) == sorted(reader) == ["a", "b", "c"]
    for name, expected in tensors.items():
        assert torch.equal(reader.get(name), expected)
        assert reader.get(name).dtype == expected.dtype
    with pytest.raises(InputRejected, match="no such tensor"):
        reader.get("d")


def test_digest_is_of_the_contents(tmp_path: Path) -> None:
    one, two = write_sharded(tmp_path / "one"), write_sharded(tmp_path / "two")
    digest = checkpoint_digest(one)
    assert len(digest) == 64
    assert checkpoint_digest(two) == digest
    (two / "README.md").write_text("not part of the model")
    assert checkpoint_digest(two) == digest
    for name in ("config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "generation_config.json"):
        changed = write_sharded(tmp_path / f"without-{name}")
        path = changed / name
        old = path.read_bytes() if path.exists() else b"{"
        path.write_bytes(old[:-1] + (b" }" if old.endswith(b"}") else b"\x01"))
        assert checkpoint_digest(changed) != digest, name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_that_is_no_number_is_named_while_the_files_are_hashed(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    folder = write_folder(tmp_path)
    tensors = {
        "a": torch.randn(3, 4),
        "ids": torch.arange(5),
        "none": torch.zeros(0),
        "z": torch.randn(1100, 1000).to(dtype),
    }
    save_file(tensors, folder / "model.safetensors")
    assert checkpoint_digest(folder) == checkpoint_digest(folder)
    tensors["z"][-1, -1] = value
    save_file(tensors, folder / "model.safetensors")
    for _ in range(2):  # a refusal is not remembered as a digest
        with pytest.raises(InputRejected, match=r"model.safetensors: z\n") as caught:
            checkpoint_digest(folder)
        assert caught.value.exit_code == 4


def test_hashing_with_the_check_gives_the_hash_of_the_file(tmp_path: Path) -> None:
    path = write_folder(tmp_path) / "model.safetensors"
    save_file({"a": torch.randn(3, 4), "b": torch.zeros(7, dtype=torch.uint8)}, path)
    assert sha256_of_finite(path) == sha256_file(path)
