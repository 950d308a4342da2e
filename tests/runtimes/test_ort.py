"""ONNX Runtime behind the runtime interface: the cache changes nothing, hostile folders are refused before loading."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.exporting.onnx import export_onnx
from moe_edge.runtimes import open_runtime, ort
from moe_edge.runtimes.base import Runtime
from tests.tiny import tiny_checkpoint, tiny_ids

IDS = tiny_ids(tokens=24, rows=1)[0].numpy()
VOCAB = 300  # of the tiny tokenizer


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ort")
    export_onnx(tiny_checkpoint(folder, "qwen3_moe", experts=4), folder / "onnx", precision="fp32")
    return folder / "onnx"


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "onnx"))


def edit_graph(folder: Path, change: Callable[[onnx.TensorProto, Path], None]) -> None:
    """Apply `change` to the first tensor with external data, without touching the weights."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    change(tensor, folder)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def point_to(location: str) -> Callable[[onnx.TensorProto, Path], None]:
    def change(tensor: onnx.TensorProto, folder: Path) -> None:
        next(entry for entry in tensor.external_data if entry.key == "location").value = location

    return change


def test_prefill_and_steps_equal_the_full_pass(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_runtime("ort", exported, threads=1, context_length=64) as runtime:
        assert isinstance(runtime, Runtime) and runtime.vocab == VOCAB
        full = runtime.logits(IDS)
        assert full.shape == (len(IDS), VOCAB) and full.dtype == np.float32
        for chunk in (512, 5):
            monkeypatch.setattr(ort, "CHUNK_TOKENS", chunk)
            rows = [runtime.prefill(IDS[:12]), *[runtime.step(int(token)) for token in IDS[12:]]]
            np.testing.assert_allclose(rows, full[11:], atol=1e-4)
        np.testing.assert_array_equal(runtime.logits(IDS), full)


def test_the_vocabulary_is_clipped_to_the_configured_one(folder: Path) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["vocab_size"] = VOCAB - 20
    (folder / "genai_config.json").write_text(json.dumps(config))
    with ort.OrtRuntime(folder, 1, 64) as runtime:
        assert runtime.logits(IDS).shape == (len(IDS), VOCAB - 20)
        assert runtime.prefill(IDS).shape == runtime.step(3).shape == (VOCAB - 20,)


def test_misuse_is_a_usage_error(exported: Path) -> None:
    runtime = ort.OrtRuntime(exported, 1, 16)
    with pytest.raises(ConfigError, match="prefill"):
        runtime.step(1)
    for ids in (IDS, IDS[:0], np.array([VOCAB]), np.array([-1])):
        with pytest.raises(ConfigError):
            runtime.prefill(ids)
    runtime.prefill(IDS[:16])
    with pytest.raises(ConfigError, match="context"):
        runtime.step(1)
    runtime.close()
    runtime.close()
    with pytest.raises(ConfigError, match="closed"):
        runtime.logits(IDS[:4])


@pytest.mark.parametrize(
    "location",
    ["/etc/hostname", "../secret", "sub/file", "..", "", "missing.data", "a\\b", "C:secret", "/model.onnx.data"],
)
def test_weights_outside_the_folder_are_refused(folder: Path, location: str) -> None:
    (folder.parent / "secret").write_bytes(b"x" * 4096)
    edit_graph(folder, point_to(location))
    with pytest.raises(InputRejected) as caught:
        ort.OrtRuntime(folder, 1, 64)
    assert caught.value.exit_code == 4 and "tensor" in str(caught.value)


def test_a_symbolic_link_is_refused(folder: Path) -> None:
    (folder / "model.onnx.data").rename(folder.parent / "elsewhere")
    (folder / "model.onnx.data").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(InputRejected, match="symbolic link"):
        ort.OrtRuntime(folder, 1, 64)


def test_a_second_location_behind_a_good_one_is_refused(folder: Path) -> None:
    (folder.parent / "secret").write_bytes(b"x" * 4096)

    def twice(tensor: onnx.TensorProto, _: Path) -> None:
        good = next(entry.value for entry in tensor.external_data if entry.key == "location")
        next(entry for entry in tensor.external_data if entry.key == "location").value = "../secret"
        tensor.external_data.add(key="location", value=good)

    edit_graph(folder, twice)
    with pytest.raises(InputRejected, match="ambiguous"):
        ort.OrtRuntime(folder, 1, 64)


def test_an_absolute_path_to_the_right_file_and_one_through_a_linked_folder_are_refused(folder: Path) -> None:
    edit_graph(folder, point_to(str(folder / "model.onnx.data")))
    with pytest.raises(InputRejected, match="outside its folder"):
        ort.OrtRuntime(folder, 1, 64)
    (folder / "linked").symlink_to(folder.parent, target_is_directory=True)
    edit_graph(folder, point_to("linked/onnx/model.onnx.data"))
    with pytest.raises(InputRejected, match="outside its folder"):
        ort.OrtRuntime(folder, 1, 64)


def test_nothing_is_loaded_before_the_check(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(ort.onnxruntime, "InferenceSession", lambda *args, **kwargs: opened.append(args[0]))
    edit_graph(folder, point_to("../secret"))
    with pytest.raises(InputRejected, match="outside its folder"):
        ort.OrtRuntime(folder, 1, 64)
    assert opened == []


def test_references_hidden_in_nodes_are_found(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    hidden = onnx.TensorProto()
    hidden.CopyFrom(tensor)
    point_to("/etc/hostname")(hidden, folder)
    inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"], value=hidden)], "g", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputRejected, match="outside its folder"):
        ort.OrtRuntime(folder, 1, 64)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.onnx", b"not a graph"),
        ("model.onnx", b""),
        ("model.onnx", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("model.onnx.data", b"short"),
        ("genai_config.json", b"{"),
        ("genai_config.json", b'{"model": {"vocab_size": -1}}'),
        ("genai_config.json", None),
        ("model.onnx", None),
    ],
)
def test_corrupt_files_are_refused(folder: Path, file: str, content: bytes | None) -> None:
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(InputRejected):
        ort.OrtRuntime(folder, 1, 64)


def test_a_graph_that_is_no_decoder_is_refused(folder: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [out])
    opset = [onnx.helper.make_opsetid("", 22)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), folder / "model.onnx")
    with pytest.raises(InputRejected, match="decoder"):
        ort.OrtRuntime(folder, 1, 64)
