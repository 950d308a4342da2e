"""Device bundles: per delivered format one folder, and the same as a .tar, that takes it to a device and proves itself there.

A bundle holds the artifact (model/), the tokenizer's files, golden.json (prompts with the teacher's answers), run.py (the
runner, a copy of device_runner.py, which needs the runtime and numpy but nothing of moe-edge), README.md with the commands,
and manifest.json with the sha256 of every file. Large files are hard links to the delivered artifact where the disk allows
it. The bytes of folder and tar depend on their content alone: names sorted, no times, no owners.

Bundles are no stage with a key: they only assemble what the stages delivered, after they have, so that switching them on or
off (`export.bundle`) computes nothing again.
"""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_edge.contracts.artifacts import ExportedArtifact, ExportFolder
from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.manifest import MANIFEST_NAME, Manifest, canonical_sha256, content_digest
from moe_edge.contracts.onnx_bits import Provider
from moe_edge.contracts.target import System
from moe_edge.exporting import device_runner, device_shell
from moe_edge.exporting.golden import GOLDEN, golden_of
from moe_edge.runtimes.gguf_header import parts_of
from moe_edge.runtimes.onnx_header import GRAPH
from moe_edge.storage.checkpoint import tokenizer_files, tokenizer_place
from moe_edge.storage.files import read_json, write_text_atomic
from moe_edge.storage.folders import BUNDLES, files_of, hash_folder, link_or_copy, written_beside

RUNNER, README, MODEL = "run.py", "README.md", "model"
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


def write_bundles(
    out: Path, exported: ExportFolder, config: BuildConfig, inputs: Mapping[str, str], versions: Mapping[str, str]
) -> list[str]:
    """Write out/artifacts/bundle/FORMAT and FORMAT.tar, or remove them where the configuration wants none.

    A graph for CUDA is a bundle of its own, onnx-cuda, experimental: its golden scores are those of its twin for the CPU.

    Args:
        out: the build's folder; `out/artifacts` is read.
        exported: what was delivered there, with its golden prompts.
        inputs, versions: what the bundles' manifests name as their origin.

    Returns:
        The folders, relative to `out`.

    Raises:
        ConfigError: the export was made by a version that left no golden prompts.
    """
    top = out / "artifacts" / BUNDLES
    shutil.rmtree(top, ignore_errors=True)
    if not config.export.bundle:
        return []
    if not exported.golden.is_file():
        raise ConfigError(
            "the export has no golden prompts",
            where=str(exported.path),
            next_command="run the build with --from export",
        )
    golden, written = read_json(exported.golden), []
    for artifact in _main(exported.summary.artifacts):
        contents = _contents(out, artifact, config, exported.summary.name, golden, inputs, versions)
        bundles: dict[str, Contents] = {artifact.format: contents}
        if artifact.format == "onnx" and config.export.onnx.provider == "cuda":
            bundles["onnx-cuda"] = _for_cuda(contents)
        for kind, content in bundles.items():
            write_bundle(content, top / kind)
            written.append((top / kind).relative_to(out).as_posix())
    return written


def _main(artifacts: Sequence[ExportedArtifact]) -> list[ExportedArtifact]:
    """The first artifact of each format."""
    found: dict[str, ExportedArtifact] = {}
    for artifact in artifacts:
        found.setdefault(artifact.format, artifact)
    return list(found.values())


def _contents(
    out: Path,
    artifact: ExportedArtifact,
    config: BuildConfig,
    name: str,
    golden: Mapping[str, Any],
    inputs: Mapping[str, str],
    versions: Mapping[str, str],
) -> Contents:
    runtime = config.target.runtime
    settings = {
        "threads": runtime.threads,
        "gpu_layers": runtime.gpu_layers,
        "kv_cache": runtime.kv_cache,
        "context_length": config.target.context_length,
    }
    is_gguf = artifact.format == "gguf"
    return Contents(
        format=artifact.format,
        name=name,
        quantization=artifact.quantization,
        artifact=out / artifact.path,
        tokenizer=tokenizer_files(out / "artifacts" / "hf") if is_gguf else (),  # ONNX brings its own
        golden=golden_of(golden, artifact.path),
        target=config.target.name,
        runtime=settings,
        inputs=inputs,
        versions=versions,
        system=config.target.system,
    )


def _for_cuda(contents: Contents) -> Contents:
    """The graph that lies inside the CPU's folder; it computes in float16 where that one computes in float32."""
    label = contents.quantization.replace("fp32", "fp16")
    return replace(contents, artifact=contents.artifact / "cuda", quantization=label, provider="cuda")


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
        link_or_copy(path, folder / "tokenizer" / tokenizer_place(path))
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
    summary = {
        "format": contents.format,
        "name": contents.name,
        "quantization": contents.quantization,
        "artifact": contents.model,
    }
    return Manifest(
        stage="bundle",
        key=canonical_sha256({"config": config, "inputs": inputs, "files": sorted(files)}),
        digest=content_digest(files),
        inputs=inputs,
        config=config,
        versions=dict(contents.versions),
        files=files,
        summary=summary,
    )


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
    commands = [
        f"llama-cli {common} -c {runtime['context_length']}{cache}",
        f"llama-server {common} -c {runtime['context_length']}{cache} --port 8080",
        f"llama-bench {common}{bench_cache} -p 128 -n 64 -r 5",
        f"llama-perplexity {common} -c {min(512, runtime['context_length'])} -f TEXT.txt",
    ]
    return [
        "The same file with llama.cpp's programs: a chat, a server, its benchmark, its perplexity.",
        _block(commands),
        *(_android_lines() if contents.has_script else []),
    ]


def _android_lines() -> list[str]:
    folder, programs = "/data/local/tmp/moe-edge", "/data/local/tmp/llama.cpp"
    commands = [
        f"adb push . {folder}",
        f"adb push LLAMA_CPP/build/bin {programs}",
        f"adb shell 'chmod +x {programs}/llama-*; sh {folder}/run.sh {programs}'",
    ]
    return [
        "On the phone without Python: `run.sh` checks the files, measures tokens/s and answers the golden prompts, with "
        "llama.cpp built for Android (its `build/bin` with llama-bench, llama-completion and the .so files); in Termux the "
        "same `sh run.sh [FOLDER]`:",
        _block(commands),
    ]


def _onnx_lines(contents: Contents) -> list[str]:
    program = [
        "import onnxruntime_genai as og",
        'model = og.Model("model")',
        "tokenizer, params = og.Tokenizer(model), og.GeneratorParams(model)",
        f"params.set_search_options(max_length={contents.runtime['context_length']}, do_sample=False)",
        "generator = og.Generator(model, params)",
        'generator.append_tokens(tokenizer.encode("Once upon a time"))',
        "while not generator.is_done():",
        "    generator.generate_next_token()",
        "print(tokenizer.decode(generator.get_sequence(0)))",
    ]
    return [
        "`model/` is a folder of onnxruntime-genai (Python, C++, C#, Java, Objective-C); in Python:",
        _block(program),
    ]
