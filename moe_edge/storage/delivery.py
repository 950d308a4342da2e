"""What leaves a build: the artifacts folder that a user ships, and the manifest over every delivered file."""

import shutil
from pathlib import Path
from typing import Any

from moe_edge.contracts.manifest import Manifest, canonical_sha256, content_digest
from moe_edge.storage.files import write_text_atomic
from moe_edge.storage.folders import changed_files, hash_file, hash_folder, mirror

BESIDE_ARTIFACTS = ("report.json", "report.md", "config.yaml")
BUNDLES = "bundle"  # in artifacts/: the device bundles, assembled from what is delivered here


def deliver(out: Path, student: Path, export: Path) -> None:
    """Assemble `out/artifacts` from the student and the exported files, unless it already holds exactly them.

    Device bundles of an earlier build stay until they are written anew.
    """
    parts = {"hf": student, "gguf": export / "gguf", "onnx": export / "onnx"}
    artifacts = out / "artifacts"
    wanted = {name: hash_folder(source) for name, source in parts.items() if source.is_dir()}
    stale = [path for path in artifacts.glob("*") if path.name not in wanted and path.name != BUNDLES]
    for name, files in wanted.items():
        target = artifacts / name
        if not target.is_dir() or changed_files(target, files) or hash_folder(target).keys() != files.keys():
            artifacts.mkdir(parents=True, exist_ok=True)
            mirror(parts[name], target)
    for path in stale:
        shutil.rmtree(path)


def write_run_manifest(out: Path, config: dict[str, Any], inputs: dict[str, str], versions: dict[str, str]) -> Manifest:
    """out/manifest.json over every delivered file, written last."""
    delivered = {f"artifacts/{name}": entry for name, entry in hash_folder(out / "artifacts").items()}
    delivered |= {name: hash_file(out / name) for name in BESIDE_ARTIFACTS if (out / name).is_file()}
    key = canonical_sha256({"config": config, "inputs": inputs, "versions": versions})
    manifest = Manifest(
        stage="run",
        key=key,
        digest=content_digest(delivered),
        inputs=inputs,
        config=config,
        versions=versions,
        files=delivered,
    )
    write_text_atomic(out / "manifest.json", manifest.to_json())
    return manifest
