"""Our GGUF path against llama.cpp's own: wall time and peak private memory (USS) of float16 + quantize, in one run.

    python -m tests.benchmarks.bench_gguf_converter LLAMA_CPP [CHECKPOINT] [--llama-quantize FILE] [--recipe Q4_K_M]

LLAMA_CPP is llama.cpp's source tree, as it lies in llama-cpp-python's source distribution:

    pip download --no-binary :all: --no-deps llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    cd llama_cpp_python-0.3.36/vendor/llama.cpp          # this folder is LLAMA_CPP
    cmake -S . -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_OPENSSL=OFF && cmake --build build --target llama-quantize -j

The binary is then build/bin/llama-quantize; without it only the float16 step is compared. Every step is a fresh process whose
USS (with its children's) is sampled from outside, imports included; "above" is the peak minus what a process weighs that
only imports the same modules. llama.cpp's converter knows tokenizers by a hash: for the random checkpoint, which is made
when none is given, it is told the name of the splitter (--pre). Repetitions alternate, medians are printed as JSON lines.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from moe_edge.runtimes.gguf_header import check_gguf_header
from tests.tiny import tiny_checkpoint

MIB = 1 << 20
SAMPLE_INTERVAL_S = 0.005
_OURS_F16 = "from moe_edge.exporting.gguf import write_gguf"
_OURS_QUANTIZE = "from moe_edge.exporting.gguf_quantize import quantize_gguf"
_THEIRS = "import convert_hf_to_gguf as converter, conversion.base as base"
Command = Sequence[str]


def main() -> None:
    options = _arguments()
    with tempfile.TemporaryDirectory(prefix="moe-edge-converter-") as scratch:
        folder = Path(scratch)
        checkpoint = options.checkpoint or _random_checkpoint(folder, options)
        steps = _steps(options, checkpoint, folder)
        baselines = {name: measure(command) for name, command in _imports(options).items()}
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for _ in range(options.repetitions):
            for name, command in steps.items():
                results[name].append(measure(command))
        medians = {name: _report(name, values, baselines.get(name, (0.0, 0.0))) for name, values in results.items()}
        _compare(medians)
        _same_tensors(folder)


def measure(command: Command) -> tuple[float, float]:
    """(seconds, peak USS in MiB) of a command and its children."""
    started, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as said:  # not a pipe, which a talkative child would fill and then wait
        process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        while process.poll() is None:
            peak = max(peak, _uss(process))
            time.sleep(SAMPLE_INTERVAL_S)
        seconds = time.perf_counter() - started
        if process.returncode != 0:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)[:300]}\n{said.read().decode(errors='replace')[-2000:]}")
    return seconds, peak / MIB


def _uss(process: psutil.Process) -> int:
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_full_info().uss
        except psutil.Error:  # it has just ended
            continue
    return total


def _steps(options: argparse.Namespace, checkpoint: Path, folder: Path) -> dict[str, Command]:
    """name -> command, ours and theirs in turn."""
    python, ours, theirs = sys.executable, folder / "ours-f16.gguf", folder / "theirs-f16.gguf"
    told = f"base.TextModel.get_vocab_base_pre = lambda *_: {options.pre!r}; " if options.pre else ""
    convert = (
        f"sys.argv = ['', {str(checkpoint)!r}, '--outfile', {str(theirs)!r}, '--outtype', 'f16']; converter.main()"
    )
    steps: dict[str, Command] = {
        "ours f16": [python, "-c", f"{_paths()}{_OURS_F16}; write_gguf(Path({str(checkpoint)!r}), Path({str(ours)!r}), "
                     "name='bench')"],
        "theirs f16": [python, "-c", f"{_paths(options.llama_cpp)}{_THEIRS}; {told}{convert}"],
    }  # fmt: skip
    if options.llama_quantize:
        target, recipe, threads = folder / "ours-q.gguf", options.recipe, options.threads
        call = f"quantize_gguf(Path({str(ours)!r}), Path({str(target)!r}), {recipe!r}, None, {threads})"
        steps["ours quantize"] = [python, "-c", f"{_paths()}{_OURS_QUANTIZE}; {call}"]
        steps["theirs quantize"] = [
            str(options.llama_quantize), str(theirs), str(folder / "theirs-q.gguf"), recipe, str(threads)
        ]  # fmt: skip
    return steps


def _imports(options: argparse.Namespace) -> dict[str, Command]:
    """Processes that import what the steps import and end."""
    return {
        "ours f16": [sys.executable, "-c", _paths() + _OURS_F16],
        "ours quantize": [sys.executable, "-c", _paths() + _OURS_QUANTIZE],
        "theirs f16": [sys.executable, "-c", _paths(options.llama_cpp) + _THEIRS],
    }


def _paths(llama_cpp: Path | None = None) -> str:
    """llama.cpp's converter needs its own, newer gguf package before the installed one."""
    more = f"sys.path[:0] = [{str(llama_cpp)!r}, {str(llama_cpp / 'gguf-py')!r}]; " if llama_cpp else ""
    return f"import sys; from pathlib import Path; {more}"


def _report(name: str, values: list[tuple[float, float]], imports: tuple[float, float]) -> tuple[float, float, float]:
    """Print the medians of a step; returns seconds, seconds above imports, MiB above imports."""
    seconds, peak = (statistics.median(column) for column in zip(*values, strict=True))
    line = {
        "benchmark": "gguf_converter", "step": name, "seconds": round(seconds, 2), "peak_uss_mib": round(peak, 1),
        "seconds_above_imports": round(seconds - imports[0], 2), "uss_above_imports_mib": round(peak - imports[1], 1),
        "repetitions": len(values),
    }  # fmt: skip
    print(json.dumps(line), flush=True)
    return seconds, seconds - imports[0], peak - imports[1]


def _compare(medians: dict[str, tuple[float, float, float]]) -> None:
    """Ours / theirs: times add up over the steps, the larger peak of memory counts."""
    totals = {}
    for side in ("ours", "theirs"):
        seconds, working, peak = zip(*(v for name, v in medians.items() if name.startswith(side)), strict=True)
        totals[side] = (sum(seconds), sum(working), max(peak))
    ratios = [ours / theirs for ours, theirs in zip(totals["ours"], totals["theirs"], strict=True)]
    names = ("seconds_ratio", "seconds_above_imports_ratio", "uss_above_imports_ratio")
    line = {"benchmark": "gguf_converter", "steps": len(medians) // 2}
    print(json.dumps(line | dict(zip(names, (round(ratio, 3) for ratio in ratios), strict=True))), flush=True)


def _same_tensors(folder: Path) -> None:
    """Do both write the same tensors in the same shapes? (Tied heads may differ: some architectures need a copy.)"""
    ours, theirs = (
        {name: tensor.shape for name, tensor in check_gguf_header(folder / f"{side}-f16.gguf").tensors.items()}
        for side in ("ours", "theirs")
    )
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    print(json.dumps({"benchmark": "gguf_converter", "tensors": len(ours), "different": different}), flush=True)


def _random_checkpoint(folder: Path, options: argparse.Namespace) -> Path:
    sizes = {"experts": options.experts, "hidden": options.hidden, "width": options.width, "layers": options.layers}
    return tiny_checkpoint(folder, "qwen3_moe", name="teacher", vocab=4096, **sizes)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp", type=Path, help="llama.cpp's source tree")
    parser.add_argument("checkpoint", type=Path, nargs="?", help="checkpoint folder; default: a random Qwen3-MoE")
    parser.add_argument("--llama-quantize", type=Path, help="the built binary; without it only float16 is compared")
    parser.add_argument("--recipe", default="Q4_K_M")
    parser.add_argument("--pre", help="name of the tokenizer's splitter, for llama.cpp's converter")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    if options.checkpoint is None and options.pre is None:
        options.pre = "gpt-2"  # the random checkpoint's
    return options


if __name__ == "__main__":
    main()
