"""sha256 of everything that a build, an export of each family and a streamed plan write: what a refactoring must not change.

    python -m tests.benchmarks.fingerprints --work DIR --out before.json
    python -m tests.benchmarks.fingerprints --work DIR2 --out after.json --compare before.json

The demo teacher is built for `cpu` and planned once more as a streamed teacher (profile.mode=layerwise); one tiny random model of
each family is exported to each format. Of report.json, seconds, speeds, memory and machine are left out: they differ from run
to run.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.exporting.gguf_models import REPRESENTABLE
from tests.tiny import ALL_FAMILIES, tiny_checkpoint

MEASURED = {"seconds", "peak_rss_mib", "speed", "memory", "machine", "device", "cached", "seconds_per_stage"}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def timeless(value: Any) -> Any:
    """Plain data without what is measured anew in each run."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in MEASURED}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def run(*arguments: object) -> int:
    command = [sys.executable, "-m", "moe_edge", *map(str, arguments)]
    environment = os.environ | {"MOE_EDGE_CACHE": str(WORK / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=(WORK / "log.txt").open("a"))
    return done.returncode


def files(folder: Path) -> dict[str, str]:
    """Digests of the files below a folder but for archives and manifests, which repeat what lies beside them."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tar")
    return {path.relative_to(folder).as_posix(): sha256(path) for path in found if path.name != "manifest.json"}


def demo() -> dict[str, Any]:
    out = WORK / "demo"
    code = run("build", "--target", "cpu", "--out", out)
    report = timeless(json.loads((out / "report.json").read_text()))
    profile = {name: sha256(out / "profile" / name) for name in ("statistics.safetensors", "logits.h5", "imatrix.gguf")}
    return {
        "exit code": code, "artifacts": files(out / "artifacts"), "profile": profile, "report": report,
        "plan.json": sha256(out / "plan" / "plan.json"),
    }  # fmt: skip


def streamed_plan() -> dict[str, Any]:
    out = WORK / "streamed"
    code = run("build", "--target", "cpu", "--out", out, "--until", "compress", "--set", "profile.mode=layerwise")
    return {
        "exit code": code,
        "plan.json": sha256(out / "plan" / "plan.json"),
        "student": files(out / "compress/model"),
    }


def exported(family: str) -> dict[str, Any]:
    """One model of the family, in each format by itself, because some families have only one."""
    sizes = {"experts": 8, "hidden": 64, "width": 32, "layers": 3} | REPRESENTABLE.get(family, {})
    model, found = tiny_checkpoint(WORK / "models", family, **sizes), {}
    for name in ("gguf", "onnx"):
        out = WORK / "export" / f"{family}-{name}"
        code = run("export", model, "--target", "cpu", "--out", out, "--set", f"export.formats=[{name}]")
        found[name] = {"exit code": code, "artifacts": files(out / "artifacts")}
    return found


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted({*one, *other})
        return [line for key in keys for line in differences(one.get(key), other.get(key), f"{at}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            line
            for place, pair in enumerate(zip(one, other, strict=True))
            for line in differences(*pair, f"{at}/{place}")
        ]
    return [] if one == other else [f"{at}: {one} -> {other}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a new folder for what is built")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument(
        "--compare", type=Path, help="the JSON file of another version; differences end with exit code 1"
    )
    parser.add_argument("--parts", nargs="*", default=["demo", "streamed", *ALL_FAMILIES])
    given = parser.parse_args()
    global WORK
    WORK = given.work
    WORK.mkdir(parents=True)
    known = {"demo": demo, "streamed": streamed_plan}
    found = {part: known[part]() if part in known else exported(part) for part in given.parts}
    given.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if given.compare:
        lines = differences(json.loads(given.compare.read_text()), found)
        print("\n".join(lines) or "nothing differs")
        sys.exit(bool(lines))


if __name__ == "__main__":
    main()
