"""The device bundle: one folder, and the same as a .tar, that takes an artifact to a device and proves itself there.

It holds the artifact (model/), the tokenizer's files, golden.json (prompts with the teacher's answers), run.py (the runner,
a copy of device_runner.py, which needs the runtime and numpy but nothing of moe-edge), README.md with the commands, and
manifest.json with the sha256 of every file. Large files are hard links to the delivered artifact where the disk allows it.
The bytes of folder and tar depend on their content alone: names sorted, no times, no owners.
"""

import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_edge.contracts.manifest import MANIFEST_NAME, Manifest, canonical_sha256, content_digest
from moe_edge.contracts.onnx_bits import Provider
from moe_edge.contracts.target import System
from moe_edge.export import device_runner, device_shell
from moe_edge.runtimes.gguf_header import parts_of
from moe_edge.runtimes.onnx_header import GRAPH
from moe_edge.storage.files import write_text_atomic
from moe_edge.storage.folders import files_of, hash_folder, link_or_copy, written_beside

RUNNER, GOLDEN, README, MODEL = "run.py", "golden.json", "README.md", "model"
RUNNERS = (RUNNER, device_shell.SCRIPT)
RUNTIME_PACKAGES = {"gguf": "llama-cpp-python", "onnx": "onnxruntime-genai", "cuda": "onnxruntime-genai-cuda"}
EXPERIMENTAL = (
    "EXPERIMENTAL: this float16 graph is for ONNX Runtime's CUDA provider. Its structure was checked, it was never run; the "
    "expected scores are those of the graph for the CPU, whose quantized weights are the same. For Jetson there is no "
    "package of onnxruntime-genai with CUDA: build it from source, and prefer the GGUF."
)


@dataclass(frozen=True)
class Contents:
    """What goes into one bundle."""

    format: str  # gguf | onnx
    name: str  # of the model, for people
    quantization: str
    artifact: Path  # the GGUF file (the first part of a split one), or the ONNX folder
    tokenizer: Sequence[Path]
    golden: Mapping[str, Any]  # golden.golden_of
    target: str
    runtime: Mapping[str, Any]  # threads, gpu_layers, context_length, kv_cache
    inputs: Mapping[str, str]  # digests of what it was made from
    versions: Mapping[str, str]
    provider: Provider = "cpu"  # of an ONNX folder
    system: System = "linux"  # of the device

    @property
    def model(self) -> str:
        """The artifact's place in the bundle: a file, or a folder."""
        return f"{MODEL}/{self.artifact.name}" if self.artifact.is_file() else MODEL

    @property
    def has_script(self) -> bool:
        """Whether run.sh comes with it: where Python and its packages are not at hand."""
        return self.format == "gguf" and self.system == "android"

    @property
    def runtime_kind(self) -> str:
        """Which package runs it."""
        return self.format if self.provider == "cpu" else self.provider

    @property
    def files(self) -> dict[Path, Path]:
        """Every file of the artifact -> its place below the bundle's model folder; a graph for another provider, which
        lies in a folder of its own inside the artifact's, is none of them."""
        if self.artifact.is_file():
            return {part: Path(part.name) for part in parts_of(self.artifact)}
        others = {graph.parent for graph in self.artifact.glob(f"*/{GRAPH}")}
        return {
            path: path.relative_to(self.artifact) for path in files_of(self.artifact) if not others & {*path.parents}
        }


def write_bundle(contents: Contents, folder: Path) -> Manifest:
    """Write `folder` and `folder`.tar, each complete or not at all; earlier ones are replaced."""
    with written_beside(folder) as beside:
        _fill(contents, beside)
        manifest = _manifest(contents, beside)
        write_text_atomic(beside / MANIFEST_NAME, manifest.to_json())
    write_tar(folder, folder.with_name(folder.name + ".tar"))
    return manifest


def _fill(contents: Contents, folder: Path) -> None:
    for path, place in contents.files.items():
        link_or_copy(path, folder / MODEL / place)
    for path in contents.tokenizer:
        link_or_copy(path, folder / "tokenizer" / path.name)
    write_text_atomic(folder / GOLDEN, json.dumps(contents.golden, sort_keys=True, separators=(",", ":")) + "\n")
    write_text_atomic(folder / RUNNER, Path(device_runner.__file__).read_text(encoding="utf-8"))
    write_text_atomic(folder / README, readme(contents))
    if contents.has_script:
        texts = device_shell.prompt_texts(contents.tokenizer[0].parent, contents.golden["prompts"])
        texts[device_shell.SCRIPT] = device_shell.shell_runner(contents.model, contents.runtime)
        for name, text in texts.items():
            write_text_atomic(folder / name, text)
        write_text_atomic(folder / device_shell.SUMS, device_shell.sums(folder))


def _manifest(contents: Contents, folder: Path) -> Manifest:
    files = hash_folder(folder)
    config = {"target": contents.target, "runtime": dict(contents.runtime)}
    inputs = dict(contents.inputs)
    return Manifest(
        stage="bundle",
        key=canonical_sha256({"config": config, "inputs": inputs, "files": sorted(files)}),
        digest=content_digest(files), inputs=inputs, config=config, versions=dict(contents.versions), files=files,
        summary={
            "format": contents.format, "name": contents.name, "quantization": contents.quantization,
            "artifact": contents.model,
        },
    )  # fmt: skip


def write_tar(folder: Path, path: Path) -> None:
    """`folder` as an uncompressed POSIX tar that is the same wherever and whenever it is made."""
    temporary = path.with_name(path.name + ".tmp")
    with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
        for file in sorted([*files_of(folder), folder / MANIFEST_NAME]):
            name = file.relative_to(folder).as_posix()
            row = tarfile.TarInfo(f"{folder.name}/{name}")
            row.size, row.mtime, row.mode = file.stat().st_size, 0, 0o755 if name in RUNNERS else 0o644
            with file.open("rb") as stream:
                archive.addfile(row, stream if row.size else io.BytesIO())
    os.replace(temporary, path)


def readme(contents: Contents) -> str:
    """README.md of a bundle: how to check it, how to run it, with the commands to type."""
    lines = [
        f"# {contents.name}, {contents.format.upper()} {contents.quantization}, for {contents.target}",
        *([EXPERIMENTAL] if contents.provider == "cuda" else []),
        "Check every file, score the golden prompts against the teacher's answers, measure the speed; prints JSON, and ends "
        "with 0 (sound), 4 (a file was changed), 5 (no runtime) or 10 (not the quality of the build host):",
        _block([f"pip install numpy {RUNTIME_PACKAGES[contents.runtime_kind]}", "python run.py"]),
        "With moe-edge installed, `moe-edge verify .` checks the files, too.",
        *(_gguf_lines(contents) if contents.format == "gguf" else _onnx_lines(contents)),
    ]
    return "\n\n".join(lines) + "\n"


def _block(commands: Sequence[str]) -> str:
    return "```\n" + "\n".join(commands) + "\n```"


def _gguf_lines(contents: Contents) -> list[str]:
    """llama.cpp's own programs on the same file, with the target's settings."""
    runtime = contents.runtime
    common = device_shell.common_options(contents.model, runtime)
    cache, bench_cache = (device_shell.cache_options(runtime, bench) for bench in (False, True))
    return [
        "The same file with llama.cpp's programs: a chat, a server, its benchmark, its perplexity.",
        _block([
            f"llama-cli {common} -c {runtime['context_length']}{cache}",
            f"llama-server {common} -c {runtime['context_length']}{cache} --port 8080",
            f"llama-bench {common}{bench_cache} -p 128 -n 64 -r 5",
            f"llama-perplexity {common} -c {min(512, runtime['context_length'])} -f TEXT.txt",
        ]),
        *(_android_lines() if contents.has_script else []),
    ]  # fmt: skip


def _android_lines() -> list[str]:
    folder, programs = "/data/local/tmp/moe-edge", "/data/local/tmp/llama.cpp"
    return [
        "On the phone without Python: `run.sh` checks the files, measures tokens/s and answers the golden prompts, with "
        "llama.cpp built for Android (its `build/bin` with llama-bench, llama-completion and the .so files); in Termux the "
        "same `sh run.sh [FOLDER]`:",
        _block([
            f"adb push . {folder}",
            f"adb push LLAMA_CPP/build/bin {programs}",
            f"adb shell 'chmod +x {programs}/llama-*; sh {folder}/run.sh {programs}'",
        ]),
    ]  # fmt: skip


def _onnx_lines(contents: Contents) -> list[str]:
    return [
        "`model/` is a folder of onnxruntime-genai (Python, C++, C#, Java, Objective-C); in Python:",
        _block([
            "import onnxruntime_genai as og",
            'model = og.Model("model")',
            "tokenizer, params = og.Tokenizer(model), og.GeneratorParams(model)",
            f"params.set_search_options(max_length={contents.runtime['context_length']}, do_sample=False)",
            "generator = og.Generator(model, params)",
            'generator.append_tokens(tokenizer.encode("Once upon a time"))',
            "while not generator.is_done():",
            "    generator.generate_next_token()",
            "print(tokenizer.decode(generator.get_sequence(0)))",
        ]),
    ]  # fmt: skip
