"""Device bundles: the runner runs alone in a bare process, folder and tar are reproducible, every kind of tampering is named."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.contracts.manifest import read_manifest
from moe_edge.exporting import golden
from moe_edge.exporting.bundles import Contents, write_bundle
from moe_edge.exporting.gguf import write_gguf
from moe_edge.exporting.gguf_split import split_gguf
from moe_edge.exporting.onnx import export_onnx
from moe_edge.exporting.verification import faults
from moe_edge.runtimes import open_runtime
from moe_edge.storage.checkpoint import tokenizer_files
from moe_edge.storage.folders import LINK_FROM_BYTES, hash_file
from tests.runtimes.test_gguf_header import HUGE_ARRAY
from tests.tiny import tiny_checkpoint

RUNTIMES = {"gguf": "llama_cpp", "onnx": "ort"}
IDS = np.arange(5, 100)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint, its GGUF and ONNX exports, and golden prompts that the checkpoint answered itself."""
    top = tmp_path_factory.mktemp("bundle")
    checkpoint = tiny_checkpoint(top, "qwen3_moe", tied=True)
    write_gguf(checkpoint, top / "exported" / "m.gguf", name="m")
    export_onnx(checkpoint, top / "exported" / "onnx", precision="fp32")
    artifacts = {"gguf": top / "exported" / "m.gguf", "onnx": top / "exported" / "onnx"}
    with open_runtime("hf", checkpoint, threads=1, context_length=128) as teacher:
        prompts = golden.from_model(teacher, IDS)
    scores = {}
    for kind, path in artifacts.items():
        with open_runtime(RUNTIMES[kind], path, threads=1, context_length=128) as artifact:
            scores[kind] = golden.expected_score(prompts, artifact)
    content = {"schema": golden.GOLDEN_SCHEMA, "teacher": "itself", "prompts": prompts, "expected": scores}
    return top, checkpoint, artifacts, content


def contents(made, kind, **changes):
    _, checkpoint, artifacts, content = made
    runtime = {"threads": None, "gpu_layers": 0, "context_length": 128, "kv_cache": "auto"}
    values = {
        "format": kind,
        "name": "m",
        "quantization": "F16" if kind == "gguf" else "fp32",
        "artifact": artifacts[kind],
        "tokenizer": tokenizer_files(checkpoint) if kind == "gguf" else (),
        "golden": golden.golden_of(content, kind),
        "target": "cpu",
        "runtime": runtime,
        "inputs": {"teacher": "sha256:t"},
        "versions": {"moe-edge": "1"},
    }
    return Contents(**(values | changes))


@pytest.fixture(params=["gguf", "onnx"])
def bundle(request, made, tmp_path):
    write_bundle(contents(made, request.param), tmp_path / "here" / request.param)
    return tmp_path / "here" / request.param


def run(folder: Path, *more: str):
    """The runner as a device starts it: no PYTHONPATH, another working directory, moe_edge barred."""
    barred = folder.parent / "barred"
    (barred / "moe_edge").mkdir(parents=True, exist_ok=True)
    (barred / "moe_edge" / "__init__.py").write_text("raise ImportError('the runner must not need moe_edge')\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(folder / "run.py"), "--threads", "1", *more],
        capture_output=True,
        text=True,
        cwd=barred,
        env=environment | {"PYTHONPATH": str(barred)},
        check=False,
    )
    return done.returncode, json.loads(done.stdout) if done.stdout.startswith("{") else done.stderr


def test_the_runner_scores_and_measures_alone(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "device" / "copy")
    code, result = run(tmp_path / "device" / "copy", "--prompt-tokens", "16", "--new-tokens", "4", "--runs", "2")
    assert code == 0, result
    assert result["passed"] is True and result["quality"]["tokens"] == len(IDS)
    assert 0 <= result["quality"]["kl_nats"] < 1e-4 and result["quality"]["top1_agreement"] > 0.95  # full precision
    assert result["expected"]["top1_agreement"] == pytest.approx(result["quality"]["top1_agreement"], abs=0.02)
    speed = result["speed"]
    assert len(speed["ttft_ms"]) == speed["runs"] == 2 and speed["decode_tokens_per_s"] > 0 and speed["ttft_ms_p50"] > 0
    assert result["peak_rss_mib"] > 10
    assert not [path for path in (tmp_path / "device" / "copy").rglob("*") if "__pycache__" in path.parts]


@pytest.mark.parametrize(
    "options", [("--runs", "0"), ("--new-tokens", "1"), ("--prompt-tokens", "0"), ("--threads", "-1"), ("--runs", "x")]
)
def test_the_runner_says_what_it_cannot_measure(made, tmp_path, options):
    write_bundle(contents(made, "gguf"), tmp_path / "b")
    code, message = run(tmp_path / "b", *options)
    assert code == 2 and options[0] in message and "Traceback" not in message


def test_the_runner_notices_another_model(made, tmp_path):
    """Golden answers of a teacher that says something else: the files are sound, the quality is not."""
    other = json.loads(json.dumps(dict(golden.golden_of(made[3], "gguf"))))
    for prompt in other["prompts"]:
        prompt["top_ids"] = [row[::-1] for row in prompt["top_ids"]]
    write_bundle(contents(made, "gguf", golden=other), tmp_path / "wrong")
    code, result = run(tmp_path / "wrong", "--no-speed")
    assert code == 10 and result["passed"] is False and result["quality"]["kl_nats"] > result["limit_kl_nats"]
    assert "speed" not in result


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_golden_scores_are_a_float64_reference(made, kind):
    """KL over the kept ids and one more outcome, written out slowly."""
    _, _, artifacts, content = made
    with open_runtime(RUNTIMES[kind], artifacts[kind], threads=1, context_length=128) as artifact:
        total, tokens = 0.0, 0
        for prompt in content["prompts"]:
            logits_SV = artifact.logits(np.array(prompt["ids"])).astype(np.float64)
            for logits_V, ids, logprobs, tail in zip(
                logits_SV, prompt["top_ids"], prompt["top_logprobs"], prompt["tail_logmass"], strict=True
            ):
                q_V = np.exp(logits_V) / np.exp(logits_V).sum()
                total += sum(np.exp(p) * (p - np.log(q_V[token])) for token, p in zip(ids, logprobs, strict=True))
                total += np.exp(tail) * (tail - np.log(1 - q_V[ids].sum()))
                tokens += 1
    assert content["expected"][kind]["kl_nats"] == pytest.approx(total / tokens, rel=0.02, abs=2e-6)


def test_golden_prompts_come_from_the_logit_cache(made, tmp_path):
    """The same numbers as from the model itself, within the cache's precision."""
    from moe_edge.formulas.divergence import teacher_topk
    from moe_edge.storage.logits import LogitCacheWriter
    from moe_edge.storage.rows import TokenRows

    checkpoint, ids_NS = made[1], np.random.default_rng(0).integers(3, 250, (6, 56), dtype=np.int32)
    TokenRows(ids_NS, ids_NS.size).save(tmp_path / "rows.safetensors")
    with open_runtime("hf", checkpoint, threads=1, context_length=128) as teacher:
        with LogitCacheWriter(tmp_path / "logits.h5", teacher.vocab, 32, (1.0, 2.0), {}) as cache:
            import torch

            for ids_S in ids_NS:
                cache.append(ids_S, *teacher_topk(torch.from_numpy(teacher.logits(ids_S)), 32, (1.0, 2.0)))
        direct = golden.from_model(teacher, ids_NS[2][: golden.PROMPT_TOKENS])
    prompts = golden.from_cache(tmp_path / "logits.h5", tmp_path / "rows.safetensors")
    assert (
        len(prompts) == golden.PROMPTS and [prompt["ids"][0] for prompt in prompts] == ids_NS[[0, 2, 3, 5], 0].tolist()
    )
    assert prompts[1]["ids"] == direct[0]["ids"]
    np.testing.assert_allclose(prompts[1]["top_logprobs"], direct[0]["top_logprobs"], atol=0.02)
    np.testing.assert_allclose(prompts[1]["tail_logmass"], direct[0]["tail_logmass"], atol=0.02)


def test_folder_and_tar_are_the_same_wherever_and_whenever(bundle, made, tmp_path):
    os.utime(made[2][bundle.name] if made[2][bundle.name].is_file() else made[2][bundle.name] / "model.onnx", (1, 1))
    write_bundle(contents(made, bundle.name), tmp_path / "there" / bundle.name)
    there = tmp_path / "there" / bundle.name
    assert read_manifest(there) == read_manifest(bundle)
    assert hash_file(there.with_suffix(".tar")) == hash_file(bundle.with_suffix(".tar"))
    with tarfile.open(bundle.with_suffix(".tar")) as archive:
        members = archive.getmembers()
    names = [member.name for member in members]
    assert names == sorted(names) and f"{bundle.name}/manifest.json" in names
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.isreg()) for m in members} == {(0, 0, 0, "", "", True)}


def test_a_split_file_travels_with_all_its_parts(made, tmp_path):
    whole = tmp_path / "exported" / "m.gguf"
    whole.parent.mkdir()
    shutil.copy(made[2]["gguf"], whole)
    parts = split_gguf(whole, 200_000)
    write_bundle(contents(made, "gguf", artifact=parts[0]), tmp_path / "b")
    assert len(parts) > 1 and sorted(p.name for p in (tmp_path / "b/model").iterdir()) == [p.name for p in parts]
    assert faults(tmp_path / "b") == [] and faults(tmp_path / "b.tar") == []
    code, result = run(tmp_path / "b", "--no-speed")
    assert code == 0 and result["quality"]["kl_nats"] < 1e-4
    (tmp_path / "b/model" / parts[-1].name).unlink()
    assert faults(tmp_path / "b") == [f"model/{parts[-1].name}: missing"]


def test_large_files_are_not_doubled(made, tmp_path):
    big = tmp_path / "big.gguf"
    big.write_bytes(made[2]["gguf"].read_bytes() + b"\0" * LINK_FROM_BYTES)
    write_bundle(contents(made, "gguf", artifact=big), tmp_path / "bundle")
    assert (tmp_path / "bundle/model/big.gguf").samefile(big)


def test_a_sound_bundle_verifies_anywhere_as_folder_and_as_tar(bundle, tmp_path):
    assert faults(bundle) == [] and faults(bundle.with_suffix(".tar")) == []
    shutil.copytree(bundle, tmp_path / "else" / "where")
    assert faults(tmp_path / "else" / "where") == []
    assert [path.name for path in bundle.parent.iterdir() if path.name.startswith(".moe-edge")] == []


@pytest.mark.parametrize("name", ["run.py", "golden.json", "README.md", "model/m.gguf", "tokenizer/tokenizer.json"])
def test_one_changed_byte_is_named(made, tmp_path, name):
    write_bundle(contents(made, "gguf"), tmp_path / "b")
    raw = bytearray((tmp_path / "b" / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "b" / name).write_bytes(bytes(raw))
    assert faults(tmp_path / "b") == [f"{name}: changed"]
    code, result = run(tmp_path / "b") if name != "run.py" else (4, {"faults": ["run.py: changed"]})
    assert code == 4 and result["faults"] == [f"{name}: changed"]


def test_missing_extra_short_and_linked_files_are_named(made, tmp_path):
    write_bundle(contents(made, "gguf"), tmp_path / "b")
    folder = tmp_path / "b"
    (folder / "README.md").unlink()
    (folder / "model" / "extra.bin").write_bytes(b"x")
    (folder / "golden.json").write_bytes(b"{}")
    elsewhere = tmp_path / "elsewhere.json"
    shutil.move(folder / "tokenizer/tokenizer.json", elsewhere)
    (folder / "tokenizer/tokenizer.json").symlink_to(elsewhere)
    found = faults(folder)
    assert [fault.split(":")[0] for fault in found] == [
        "README.md",
        "golden.json",
        "tokenizer/tokenizer.json",
        "model/extra.bin",
    ]
    assert "symbolic link" in found[2] and "not in the manifest" in found[3]
    assert run(folder)[0] == 4


def forged(folder: Path, name: str, raw: bytes, **more: str) -> None:
    """A bundle whose maker also wrote the manifest: the sha256 is right, the content is not."""
    (folder / name).write_bytes(raw)
    manifest = read_manifest(folder)
    assert manifest is not None
    files = dict(manifest.files) | {name: hash_file(folder / name)}
    for bad, like in more.items():
        files[bad] = files[like]
    (folder / "manifest.json").write_text(manifest.model_copy(update={"files": files}).to_json())


def test_a_crafted_header_with_the_right_hash_is_a_fault(made, tmp_path):
    write_bundle(contents(made, "gguf"), tmp_path / "b")
    forged(tmp_path / "b", "model/m.gguf", HUGE_ARRAY)
    (fault,) = faults(tmp_path / "b")
    assert fault.startswith("model/m.gguf: not a valid GGUF") and "9223372036854775808" in fault


def test_an_onnx_graph_that_points_outside_is_a_fault(made, tmp_path):
    import onnx

    write_bundle(contents(made, "onnx"), tmp_path / "b")
    graph = onnx.load(tmp_path / "b/model/model.onnx", load_external_data=False)
    tensor = next(t for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "../../secret"
    forged(tmp_path / "b", "model/model.onnx", graph.SerializeToString())
    (fault,) = faults(tmp_path / "b")
    assert fault.startswith("model/model.onnx:") and "outside" in fault


def test_an_onnx_folder_for_a_provider_that_we_never_write_is_a_fault(made, tmp_path):
    write_bundle(contents(made, "onnx"), tmp_path / "b")
    config = json.loads((tmp_path / "b/model/genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = [{"cuda": {}}, {"x.so": {}}]
    forged(tmp_path / "b", "model/genai_config.json", json.dumps(config).encode())
    (fault,) = faults(tmp_path / "b")
    assert fault.startswith("model/model.onnx:") and "not for the CPU or cuda" in fault and "provider x.so" in fault


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../b"])
def test_names_that_leave_the_folder_are_not_followed(made, tmp_path, name):
    write_bundle(contents(made, "gguf"), tmp_path / "b")
    forged(tmp_path / "b", "README.md", b"x", **{name: "README.md"})
    assert faults(tmp_path / "b") == [f"{name}: the name leaves the folder"]


def tar_with(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    import io

    with tarfile.open(path, "w") as archive:
        for member, raw in members:
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path


def member(name: str, **fields):
    made = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(made, key, value)
    return made


# A file of one byte behind 2^40 - 1 bytes of nothing, in GNU tar's format 1.0.
SPARSE = {
    "GNU.sparse.major": "1",
    "GNU.sparse.minor": "0",
    "GNU.sparse.name": "a/huge",
    "GNU.sparse.realsize": str(1 << 40),
}


@pytest.mark.parametrize(
    "rows",
    [
        [(member("../evil"), b"x")],
        [(member("/tmp/evil"), b"x"), (member("a/b"), b"x")],
        [(member("a/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), b"")],
        [(member("a/hard", type=tarfile.LNKTYPE, linkname="../../x"), b"")],
        [(member("a/fifo", type=tarfile.FIFOTYPE), b"")],
        [(member("a/x"), b"x"), (member("b/y"), b"y")],
        [(member("a/huge", pax_headers=SPARSE), b"1\n1099511627775\n1\n".ljust(512, b"\0") + b"x")],
    ],
    ids=["parent", "absolute", "symlink", "hard link", "fifo", "two folders", "a terabyte of holes"],
)
def test_hostile_tars_are_refused_and_write_nothing_outside(tmp_path, rows):
    (tmp_path / "in").mkdir()
    with pytest.raises(InputRejected):
        faults(tar_with(tmp_path / "in" / "x.tar", *rows))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "x.tar"]
    assert not Path("/tmp/evil").exists()


def test_a_truncated_tar_is_refused(made, tmp_path):
    write_bundle(contents(made, "gguf"), tmp_path / "b")
    raw = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "c.tar").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(InputRejected, match="cannot be read"):
        faults(tmp_path / "c.tar")


def test_a_folder_without_a_manifest_is_the_users_mistake(tmp_path):
    with pytest.raises(ConfigError, match="manifest"):
        faults(tmp_path)


def test_the_readme_has_commands_for_the_targets_settings(made):
    from moe_edge.exporting.bundles import readme

    runtime = {"threads": 6, "gpu_layers": -1, "context_length": 4096, "kv_cache": "q8_0"}
    text = readme(contents(made, "gguf", runtime=runtime, target="jetson"))
    assert "llama-cli -m model/m.gguf -t 6 -ngl -1 -c 4096 -fa on -ctk q8_0 -ctv q8_0" in text
    assert "llama-bench -m model/m.gguf -t 6 -ngl -1" in text
    assert "adb" not in text, "a Jetson is no phone"
    assert "max_length=128" in readme(contents(made, "onnx"))
