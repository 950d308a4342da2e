"""The device bundles of a finished export: for each delivered format the main artifact, made ready to travel.

Not a stage with a key: it only assembles what the stages delivered, after they have, so that switching it on or off
(`export.bundle`) computes nothing again.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_edge.contracts.config import BuildConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.export.bundle import Contents, write_bundle
from moe_edge.export.golden import golden_of
from moe_edge.storage.checkpoint import tokenizer_files
from moe_edge.storage.files import read_json
from moe_edge.storage.folders import BUNDLES

GOLDEN = "golden.json"


def write_bundles(
    out: Path, artifacts: Sequence[Mapping[str, Any]], config: BuildConfig, name: str,
    inputs: Mapping[str, str], versions: Mapping[str, str],
) -> list[str]:  # fmt: skip
    """Write out/artifacts/bundle/FORMAT and FORMAT.tar, or remove them where the configuration wants none.

    A graph for CUDA is a bundle of its own, onnx-cuda, experimental: its golden scores are those of its twin for the CPU.

    Args:
        out: the build's folder; `out/export/golden.json` and `out/artifacts` are read.
        artifacts: the export's rows, the main one of each format first.
        name: of the model.
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
    if not (out / "export" / GOLDEN).is_file():
        raise ConfigError(
            "the export has no golden prompts",
            where=str(out / "export"),
            next_command="run the build with --from export",
        )
    golden, written = read_json(out / "export" / GOLDEN), []
    for row in _main(artifacts):
        contents = _contents(out, row, config, name, golden, inputs, versions)
        bundles = {row["format"]: contents}
        if row["format"] == "onnx" and config.export.onnx.provider == "cuda":
            bundles["onnx-cuda"] = _for_cuda(contents)
        for kind, content in bundles.items():
            write_bundle(content, top / kind)
            written.append((top / kind).relative_to(out).as_posix())
    return written


def _for_cuda(contents: Contents) -> Contents:
    """The graph that lies inside the CPU's folder; it computes in float16 where that one computes in float32."""
    label = contents.quantization.replace("fp32", "fp16")
    return replace(contents, artifact=contents.artifact / "cuda", quantization=label, provider="cuda")


def _main(artifacts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first artifact of each format."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in artifacts:
        found.setdefault(row["format"], row)
    return list(found.values())


def _contents(
    out: Path, row: Mapping[str, Any], config: BuildConfig, name: str, golden: Mapping[str, Any],
    inputs: Mapping[str, str], versions: Mapping[str, str],
) -> Contents:  # fmt: skip
    runtime = config.target.runtime
    return Contents(
        format=row["format"], name=name, quantization=row["quantization"], artifact=out / row["path"],
        tokenizer=tokenizer_files(out / "artifacts" / "hf") if row["format"] == "gguf" else (),  # ONNX brings its own
        golden=golden_of(golden, row["path"]), target=config.target.name,
        runtime={
            "threads": runtime.threads, "gpu_layers": runtime.gpu_layers, "kv_cache": runtime.kv_cache,
            "context_length": config.target.context_length,
        },
        inputs=inputs, versions=versions, system=config.target.system,
    )  # fmt: skip
