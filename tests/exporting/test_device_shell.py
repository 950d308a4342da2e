"""run.sh of a bundle for Android, run by a POSIX shell with programs that only say what they were asked."""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_edge.exporting import golden
from moe_edge.exporting.bundles import Contents, write_bundle
from moe_edge.exporting.gguf import write_gguf
from moe_edge.exporting.verification import faults
from moe_edge.models.loading import load_tokenizer
from moe_edge.storage.checkpoint import tokenizer_files
from tests.tiny import TEXTS, tiny_checkpoint

BENCH = """#!/bin/sh
echo "bench $*" >> "$ASKED"
echo '| model | size | test | t/s |'
echo '| x     | 1 MB | pp128 | 98.50 ± 1.20 |'
echo '| x     | 1 MB | tg64 | 12.34 ± 0.05 |'
"""
WRITER = """#!/bin/sh
echo "writer $*" >> "$ASKED"
while [ "$1" != -f ]; do shift; done
echo "answer to $(cat "$2")"
"""
SHELL = shutil.which("dash") or "sh"  # dash knows nothing beyond POSIX


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Contents for a phone: a real file and tokenizer, golden prompts of two texts."""
    top = tmp_path_factory.mktemp("shell")
    checkpoint = tiny_checkpoint(top, "qwen3_moe", layers=1)
    write_gguf(checkpoint, top / "m x.gguf", name="m")
    ids = [np.array(load_tokenizer(checkpoint)(text)["input_ids"]) for text in TEXTS[:2]]
    prompts = [{"ids": row_S.tolist(), "top_ids": [], "top_logprobs": [], "tail_logmass": []} for row_S in ids]
    content = {"schema": golden.GOLDEN_SCHEMA, "teacher": "itself", "prompts": prompts, "expected": {"kl_nats": 0}}
    runtime = {"threads": 6, "gpu_layers": 0, "context_length": 64, "kv_cache": "q8_0"}
    return Contents(
        format="gguf",
        name="m",
        quantization="F16",
        artifact=top / "m x.gguf",
        tokenizer=tokenizer_files(checkpoint),
        golden=content,
        target="mobile",
        runtime=runtime,
        inputs={},
        versions={},
        system="android",
    )


@pytest.fixture
def bundle(made, tmp_path):
    write_bundle(made, tmp_path / "phone" / "gguf")
    return tmp_path / "phone" / "gguf"


def programs(folder: Path, **scripts: str) -> Path:
    folder.mkdir()
    for name, text in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(text)
        path.chmod(0o755)
    return folder


def run(bundle: Path, *arguments: object, path: str = "/usr/bin:/bin"):
    asked = bundle.parent / "asked"
    done = subprocess.run(
        [SHELL, str(bundle / "run.sh"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=bundle.parent,
        env={"PATH": path, "ASKED": str(asked)},
    )
    return done, asked.read_text().splitlines() if asked.exists() else []


@pytest.mark.parametrize("on_path", [True, False])
@pytest.mark.parametrize("writer", ["llama_completion", "llama_cli"])
def test_files_speed_and_answers(bundle, tmp_path, writer, on_path):
    folder = programs(bundle.parent / "bin", llama_bench=BENCH, **{writer: WRITER})
    given = ([], {"path": f"{folder}:/usr/bin:/bin"}) if on_path else (["bin"], {})
    done, asked = run(bundle, *given[0], **given[1])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["files: ok", "prompt tokens/s: 98.50 ± 1.20 ", "decode tokens/s: 12.34 ± 0.05 "]
    assert all(f"answer to {text.splitlines()[0]}" in done.stdout for text in TEXTS[:2])
    model = "-m model/m x.gguf -t 6 -ngl 0"
    assert asked[0] == f"bench {model} -fa 1 -ctk q8_0 -ctv q8_0 -p 128 -n 64 -r 5"
    cache = "-c 64 -fa on -ctk q8_0 -ctv q8_0"
    assert asked[1:] == [f"writer {model} {cache} -no-cnv --temp 0 -n 32 -f prompts/{n}.txt" for n in (1, 2)], (
        "the programs lie outside the bundle and find its files"
    )
    assert faults(bundle) == [], "nothing was written into the bundle"


def test_missing_programs_are_named_with_what_to_do(bundle):
    done, _ = run(bundle)
    assert done.returncode == 5 and "missing: llama-bench" in done.stderr and "sh run.sh FOLDER" in done.stderr
    folder = programs(bundle.parent / "bin", llama_bench=BENCH)
    done, asked = run(bundle, folder)
    assert done.returncode == 5 and "missing: llama-completion llama-cli" in done.stderr and asked == []
    done, _ = run(bundle, path=str(programs(bundle.parent / "few", dirname='#!/bin/sh\necho "${1%/*}"\n')))
    assert done.returncode == 5 and "missing: sha256sum" in done.stderr


@pytest.mark.parametrize("name", ["model/m x.gguf", "golden.json", "prompts/1.txt", "run.py"])
def test_a_changed_or_missing_file_ends_it(bundle, name):
    folder = programs(bundle.parent / "bin", llama_bench=BENCH, llama_cli=WRITER)
    raw = bytearray((bundle / name).read_bytes())
    raw[-1] ^= 1
    (bundle / name).write_bytes(raw)
    done, asked = run(bundle, folder)
    assert (
        done.returncode == 4
        and f"{name}: FAILED" in done.stderr
        and asked == []
        and "golden.json: OK" not in done.stderr
    )
    (bundle / name).unlink()
    done, asked = run(bundle, folder)
    assert done.returncode == 4 and f"{name}: FAILED" in done.stderr and asked == []


def test_a_program_that_fails_is_told(bundle):
    folder = programs(bundle.parent / "bin", llama_bench=BENCH, llama_cli="#!/bin/sh\nexit 9\n")
    done, _ = run(bundle, folder)
    assert done.returncode == 1 and "llama-cli failed" in done.stderr
    (folder / "llama-bench").write_text("#!/bin/sh\nexit 9\n")
    done, _ = run(bundle, folder)
    assert done.returncode == 1 and "llama-bench failed" in done.stderr


def test_only_a_phone_gets_it_and_the_readme_says_how(made, bundle, tmp_path):
    text = (bundle / "README.md").read_text()
    assert "adb push . /data/local/tmp/moe-edge" in text and "run.sh" in text
    write_bundle(replace(made, system="linux", target="jetson"), tmp_path / "board")
    assert not (tmp_path / "board" / "run.sh").exists() and not (tmp_path / "board" / "prompts").exists()
    assert "adb" not in (tmp_path / "board" / "README.md").read_text()
    mode = os.stat(bundle / "run.sh").st_mode
    assert mode & 0o400 and faults(bundle.with_suffix(".tar")) == []
