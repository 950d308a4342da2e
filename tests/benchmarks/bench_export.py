"""Exported files of one model: bytes against KL, and speed, for llama.cpp's mixtures, our chosen bits and ONNX.

    python -m tests.benchmarks.bench_export MODEL [--statistics FILE] [--tokens 4096] [--sensitivity-tokens 1024] [--out DIR]

MODEL is a checkpoint folder; FILE the statistics.safetensors of its profile, whose imatrix the second half of the lines uses.
Families of lines:

- "llama.cpp": libllama's own mixture of that name, its heuristics untouched, without and with the imatrix;
- "recipe": our recipe of that name, where there is one (every tensor's type pinned);
- "chosen": the planner's mix, from the KL that each class of tensors costs (measured here), under the bytes of each
  llama.cpp file as its budget, so that the two are compared at the same size;
- "onnx": int8 and int4.

KL (nats per token), top-1 agreement and perplexity are against the model in transformers on the default held-out text;
decode tokens/s and peak memory come from a fresh process each. One JSON line each on stdout, then a table, then a line that
says where the chosen points lie against llama.cpp's; DIR/export.jsonl keeps the lines, DIR/export.svg draws the points.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_edge.contracts.config_io import resolve_config
from moe_edge.contracts.quantization import RECIPES
from moe_edge.contracts.targets_io import read_target
from moe_edge.devices import harness
from moe_edge.devices.transport import LocalTransport
from moe_edge.exporting.gguf import write_gguf
from moe_edge.exporting.gguf_quantize import quantize_gguf
from moe_edge.exporting.imatrix import imatrix_arrays
from moe_edge.exporting.onnx import export_onnx
from moe_edge.families import family_of
from moe_edge.metrics.reference import judge_runtime, spill_logits
from moe_edge.models.loading import load_model, load_tokenizer
from moe_edge.planning.bits import Sensitivity
from moe_edge.planning.estimate import Packing, file_bytes
from moe_edge.planning.headers import model_headers
from moe_edge.planning.options import BudgetLimits, space_of
from moe_edge.planning.sensitivity import measure_sensitivity
from moe_edge.planning.spend import allocate
from moe_edge.reporting.markdown import number, table
from moe_edge.runtimes import open_runtime
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.statistics import Statistics
from moe_edge.texts.recipes import load_recipe
from moe_edge.texts.rows import calibration_rows, heldout_rows

# llama.cpp's mixtures and their llama_ftype, most bits first
MIXTURES = {"Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q4_K_M": 15, "IQ4_XS": 30, "Q3_K_M": 12, "Q2_K": 10}
ROW_TOKENS = 512
PROMPT_TOKENS, NEW_TOKENS = 64, 64


@dataclass(frozen=True)
class Bench:
    """One run: what is measured, on what, where to."""

    model: Path
    work: Path
    spec: Any
    statistics: Statistics | None
    rows_NS: np.ndarray
    reference_NSV: np.ndarray
    options: argparse.Namespace

    @property
    def imatrix(self) -> dict[str, np.ndarray] | None:
        return imatrix_arrays(self.statistics.imatrix, self.spec) if self.statistics else None


def llama_mixture(source: Path, target: Path, name: str, imatrix: dict[str, np.ndarray] | None, threads: int) -> None:
    """libllama's own choice of types. Raises SystemExit with its words when it refuses."""
    import ctypes

    from llama_cpp import llama_cpp as lib

    from moe_edge.exporting.gguf_quantize import _imatrix
    from moe_edge.runtimes.llama_cpp import last_errors, quiet_llama

    quiet_llama()
    params = lib.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, MIXTURES[name]
    vectors = {key: np.ascontiguousarray(value, np.float32) for key, value in (imatrix or {}).items()}
    rows = _imatrix(vectors)
    if imatrix:
        params.imatrix = rows
    if lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) != 0:
        raise SystemExit(f"llama.cpp could not quantize to {name}: {last_errors()}")


def judged(bench: Bench, runtime: str, path: Path, **fields: Any) -> dict[str, Any]:
    """One line: quality in this process, speed and memory in a fresh one."""
    options = bench.options
    with open_runtime(runtime, path, threads=options.threads, context_length=bench.rows_NS.shape[1]) as artifact:
        score = judge_runtime(artifact, bench.rows_NS, {"model": bench.reference_NSV}, fields["name"])["model"]
    size = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.glob("model.onnx*"))
    line = {
        **fields, "bytes": size, "kl_nats": score.kl_nats, "kl_nats_ci95": score.kl_nats_ci95,
        "top1_agreement": score.top1_agreement, "perplexity": score.perplexity,
        "model_perplexity": score.reference_perplexity, "tokens": score.n_tokens,
    }  # fmt: skip
    if options.repetitions:
        job = harness.BenchJob(
            runtime, str(path.resolve()), options.threads, PROMPT_TOKENS, NEW_TOKENS, options.repetitions
        )
        outcome = harness.measure(LocalTransport(), job)
        speed, memory = harness.to_speed(outcome, PROMPT_TOKENS), harness.to_memory(outcome)
        line |= {"decode_tokens_per_s": speed.decode_tokens_per_s, "ttft_ms_p50": speed.ttft_ms_p50}
        line |= {
            "peak_rss_mib": memory.peak_rss_mib,
            "failure": speed.reason if isinstance(outcome, harness.Failure) else None,
        }
    print(json.dumps(line), flush=True)
    return line


def gguf_lines(bench: Bench, full: Path) -> Iterator[dict[str, Any]]:
    """llama.cpp's mixtures and our recipes, without and with the imatrix."""
    for imatrix in (None, bench.imatrix) if bench.statistics else (None,):
        for name in bench.options.mixtures:
            path = bench.work / "x.gguf"
            llama_mixture(full, path, name, imatrix, bench.options.threads)
            yield judged(bench, "llama_cpp", path, family="llama.cpp", name=name, imatrix=imatrix is not None)
            if name in RECIPES and bench.options.recipes:
                quantize_gguf(full, path, name, imatrix, bench.options.threads)
                yield judged(bench, "llama_cpp", path, family="recipe", name=name, imatrix=imatrix is not None)


def measured(bench: Bench) -> Sensitivity:
    """What every class costs on calibration rows, which the judge never sees."""
    length = bench.rows_NS.shape[1]
    rows = calibration_rows(
        load_recipe("default"), load_tokenizer(bench.model), bench.options.sensitivity_tokens, length, 0
    )
    imatrix = bench.statistics.imatrix if bench.statistics else None
    return measure_sensitivity(load_model(bench.model), torch.from_numpy(rows.ids_NS), imatrix, bench.options.threads)


def chosen_lines(bench: Bench, full: Path, uniform: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The planner's mix at the bytes of every llama.cpp file that used the same imatrix."""
    headers = model_headers(inspect_checkpoint(bench.model))
    space = space_of(headers, resolve_config(read_target("cpu")).target, bench.spec.moe.top_k)
    known, imatrix = measured(bench), bench.imatrix
    # The planner allows for a longer header than this one: a file of its budget would be smaller than llama.cpp's by that.
    allowed = file_bytes(headers, bench.spec.moe.experts, Packing("gguf", "F16")) - full.stat().st_size
    for line in uniform:
        if line["imatrix"] != (imatrix is not None):
            continue
        at = replace(space, limits=BudgetLimits(line["bytes"] + allowed, None, None))
        found = allocate(at, bench.spec.moe.experts, known)
        if found is None:
            print(json.dumps({"family": "chosen", "name": f"<= {line['name']}", "failure": "nothing fits"}), flush=True)
            continue
        option, predicted = found
        path = bench.work / "x.gguf"
        quantize_gguf(full, path, option.packing.name, imatrix, bench.options.threads, dict(option.packing.mix))
        expected = file_bytes(headers, bench.spec.moe.experts, option.packing)
        if path.stat().st_size > line["bytes"]:
            raise SystemExit(
                f"the mix took {path.stat().st_size} bytes, more than the {line['bytes']} of {line['name']}"
            )
        fields = {"label": option.packing.label, "mix": dict(option.packing.mix)}
        fields |= {"predicted_kl_nats": predicted, "predicted_bytes": expected - allowed}
        yield judged(
            bench, "llama_cpp", path, family="chosen", name=f"<= {line['name']}", imatrix=imatrix is not None, **fields
        )


def onnx_lines(bench: Bench) -> Iterator[dict[str, Any]]:
    """int8 and int4, without and with the imatrix."""
    for imatrix in (None, bench.statistics.imatrix) if bench.statistics else (None,):
        for precision in ("int8", "int4"):
            path = bench.work / f"onnx-{precision}"
            export_onnx(bench.model, path, precision=precision, imatrix=imatrix)
            yield judged(bench, "ort", path, family="onnx", name=precision, imatrix=imatrix is not None)


def at_each_budget(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """KL of each chosen file over that of the llama.cpp file whose bytes were its budget (it has no more bytes)."""
    chosen = {line["name"].removeprefix("<= "): line for line in lines if line["family"] == "chosen"}
    pairs = [
        (line, chosen[line["name"]]) for line in lines
        if line["family"] == "llama.cpp" and line["name"] in chosen and line["imatrix"] == chosen[line["name"]]["imatrix"]
    ]  # fmt: skip
    ratios = {theirs["name"]: ours["kl_nats"] / theirs["kl_nats"] for theirs, ours in pairs}
    return {
        "summary": "KL of chosen / llama.cpp under the same bytes", "ratios": ratios,
        "bytes_ratios": {theirs["name"]: ours["bytes"] / theirs["bytes"] for theirs, ours in pairs},
        "on_or_under": sum(ratio <= 1 for ratio in ratios.values()), "of": len(ratios),
    }  # fmt: skip


def as_table(lines: list[dict[str, Any]]) -> str:
    """What was measured, smallest file first in each family."""
    header = ("family", "file", "imatrix", "MiB", "KL, nats", "top-1", "perplexity", "decode tok/s", "peak MiB")
    rows = [
        (
            line["family"], line["name"], "yes" if line["imatrix"] else "no", number(line["bytes"] / 2**20),
            number(line["kl_nats"]), number(line["top1_agreement"]), number(line["perplexity"]),
            number(line.get("decode_tokens_per_s")), number(line.get("peak_rss_mib")),
        )
        for line in sorted(lines, key=lambda line: (line["family"], line["imatrix"], line["bytes"]))
    ]  # fmt: skip
    return table(header, rows)


def draw(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """KL against bytes, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {"llama.cpp": "o-", "recipe": "s", "chosen": "*", "onnx": "^"}
    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    for family, style in styles.items():
        for imatrix in (False, True):
            points = sorted(
                (line["bytes"] / 2**20, line["kl_nats"], line["name"]) for line in lines
                if line["family"] == family and line["imatrix"] == imatrix and line.get("kl_nats")
            )  # fmt: skip
            if points:
                sizes, nats, names = zip(*points, strict=True)
                label = family + (" with imatrix" if imatrix else "")
                (drawn,) = axes.plot(sizes, nats, style, alpha=1.0 if imatrix else 0.5, label=label)
                for size, kl, name in zip(sizes, nats, names, strict=True):
                    if family in ("llama.cpp", "onnx") and (imatrix or not any(row["imatrix"] for row in lines)):
                        axes.annotate(name, (size, kl), textcoords="offset points", xytext=(4, 4), fontsize=7)
                drawn.set_markersize(12 if family == "chosen" else 5)
    axes.set(xscale="log", yscale="log", xlabel="file, MiB", ylabel="KL to the model, nats per token", title=title)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.model)
    length = min(ROW_TOKENS, options.tokens)
    rows_NS = heldout_rows("default", tokenizer, options.tokens, length).ids_NS
    headers = inspect_checkpoint(options.model)
    spec = family_of(headers.config).spec(headers.config)
    statistics = Statistics.load(options.statistics) if options.statistics else None
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="moe-edge-bench-export-", dir=options.out) as scratch:
        work = Path(scratch)
        with open_runtime("hf", options.model, threads=options.threads, context_length=length) as model:
            reference_NSV = spill_logits(model, rows_NS, work / "reference.f32", "reference")
        bench = Bench(options.model, work, spec, statistics, rows_NS, reference_NSV, options)
        write_gguf(options.model, work / "f16.gguf", name="bench")
        lines = list(gguf_lines(bench, work / "f16.gguf"))
        lines += chosen_lines(bench, work / "f16.gguf", [line for line in lines if line["family"] == "llama.cpp"])
        lines += onnx_lines(bench) if options.onnx else ()
    summary = at_each_budget(lines)
    print(f"{as_table(lines)}\n{json.dumps(summary)}", flush=True)
    (options.out / "export.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, summary]))
    draw(lines, options.out / "export.svg", f"{options.model.name}: {rows_NS.size} held-out tokens")
    print(f"drawn: {options.out / 'export.svg'}", file=sys.stderr)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--statistics", type=Path, help="statistics.safetensors of the model's profile")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens of the judge")
    parser.add_argument("--sensitivity-tokens", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=5, help="measured runs per file; 0 = no speed")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--mixtures", nargs="+", choices=MIXTURES, default=list(MIXTURES))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-export"))
    parser.add_argument("--no-onnx", dest="onnx", action="store_false")
    parser.add_argument("--no-recipes", dest="recipes", action="store_false")
    return parser.parse_args()


if __name__ == "__main__":
    main()
