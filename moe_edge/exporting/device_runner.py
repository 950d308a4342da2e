"""Checks and measures one moe-edge device bundle where it lies: files, quality on the golden prompts, speed. Prints JSON.

    python run.py [--threads N] [--gpu-layers N] [--prompt-tokens 128] [--new-tokens 64] [--runs 5] [--no-speed]

Needs numpy and, for a GGUF bundle, llama-cpp-python, for an ONNX bundle onnxruntime-genai; nothing of moe-edge. Exit codes:
0 sound, 2 a wrong option, 4 a file is missing, changed or too much, 5 the runtime is not installed, 10 the quality is not
the build host's.

kl_nats is KL(teacher || this artifact), mean per token, over the teacher's best ids with everything else as one more
outcome: a lower bound of the full KL. ttft_ms runs from token ids to the first chosen token; decode_tokens_per_s is
(n - 1) / (t_last - t_first). Legend: S tokens of a prompt, K the teacher's best ids, V vocabulary.
"""

import argparse
import ctypes
import hashlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CHUNK_BYTES = 1 << 22
LEAST_MASS = 1e-12  # float32 logits cannot tell a smaller remainder from nothing


def check_files(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with the files beside the manifest: missing, changed, or not listed."""
    faults = []
    for name, entry in sorted(files.items()):
        path = folder / name
        if not path.is_file() or path.is_symlink():
            faults.append(f"{name}: missing")
        elif path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
            faults.append(f"{name}: changed")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return faults + [f"{name}: not in the manifest" for name in sorted(present - set(files) - {"manifest.json"})]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def score(prompts: Sequence[dict[str, Any]], logits_of: Callable[[Sequence[int]], np.ndarray]) -> dict[str, Any]:
    """Mean KL(teacher || artifact) and share of equal best tokens over the golden prompts.

    Args:
        prompts: {"ids": [S], "top_ids": [S][K], "top_logprobs": [S][K], "tail_logmass": [S], null = no mass} each.
        logits_of: token ids -> the artifact's logits [S, V].
    """
    nats, agree, tokens = 0.0, 0, 0
    for prompt in prompts:
        logits_SV = np.asarray(logits_of(prompt["ids"]), dtype=np.float64)
        top_SK, p_SK = np.asarray(prompt["top_ids"]), np.asarray(prompt["top_logprobs"], dtype=np.float64)
        logits_SV -= logits_SV.max(-1, keepdims=True)
        q_SK = np.take_along_axis(logits_SV, top_SK, -1) - np.log(np.exp(logits_SV).sum(-1, keepdims=True))
        rest_S = np.log(np.maximum(1 - np.exp(q_SK).sum(-1), LEAST_MASS))
        tail_S = np.array([-math.inf if value is None else value for value in prompt["tail_logmass"]])
        with np.errstate(invalid="ignore"):
            tail_nats_S = np.where(np.isfinite(tail_S), np.exp(tail_S) * (tail_S - rest_S), 0.0)
        nats += float((np.exp(p_SK) * (p_SK - q_SK)).sum() + tail_nats_S.sum())
        agree += int((logits_SV.argmax(-1) == top_SK[:, 0]).sum())
        tokens += len(top_SK)
    return {"kl_nats": nats / tokens, "top1_agreement": agree / tokens, "tokens": tokens}


class GgufModel:
    """One GGUF file in llama-cpp-python's low-level API, which gives the logits of every position."""

    def __init__(self, path: Path, threads: int, context_length: int, gpu_layers: int) -> None:
        from llama_cpp import llama_cpp as lib

        self.lib = lib
        self._silent = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(self._silent, ctypes.c_void_p(0))
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        if hasattr(params, "use_extra_bufts"):  # llama.cpp's AMX kernels crash when compiled by gcc 12
            params.use_extra_bufts = b"AMX_INT8 = 1" not in lib.llama_print_system_info()
        self.model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        options = lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context_length
        options.n_threads = options.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot make a context of {context_length} tokens")
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.position = 0

    def logits(self, ids_S: Sequence[int]) -> np.ndarray:
        """Logits [S, V] of every position, from an empty context."""
        self._clear()
        self._decode(ids_S, every=True)
        return np.stack([self._row(row) for row in range(len(ids_S))])

    def prefill(self, ids_S: Sequence[int]) -> np.ndarray:
        """Empty the context, read the prompt, return the last logits [V]."""
        self._clear()
        self._decode(ids_S, every=False)
        return self._row(-1)

    def step(self, token: int) -> np.ndarray:
        """Append one token, return its logits [V]."""
        self._decode([token], every=False)
        return self._row(-1)

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.position = 0

    def _decode(self, ids_S: Sequence[int], every: bool) -> None:
        batch = self.lib.llama_batch_init(len(ids_S), 0, 1)
        batch.n_tokens = len(ids_S)
        for row, token in enumerate(ids_S):
            batch.token[row], batch.pos[row] = int(token), self.position + row
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
            batch.logits[row] = every or row == len(ids_S) - 1
        status = self.lib.llama_decode(self.context, batch)
        self.lib.llama_batch_free(batch)
        if status != 0:
            raise SystemExit(f"llama.cpp could not decode (status {status})")
        self.position += len(ids_S)

    def _row(self, row: int) -> np.ndarray:
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, row), (self.vocab,)).copy()


class OnnxModel:
    """One ONNX folder in onnxruntime-genai."""

    def __init__(self, path: Path, threads: int, context_length: int, gpu_layers: int) -> None:
        import onnxruntime_genai as genai

        config = genai.Config(str(path))
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.genai, self.model, self.context_length = genai, genai.Model(config), context_length
        self.generator: Any = None

    def logits(self, ids_S: Sequence[int]) -> np.ndarray:
        """Logits [S, V] of every position, from an empty context."""
        self.prefill(ids_S)
        return np.array(self.generator.get_output("logits"))[0]

    def prefill(self, ids_S: Sequence[int]) -> np.ndarray:
        """Empty the context, read the prompt, return the last logits [V]."""
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(max_length=self.context_length, do_sample=False)
        self.generator = self.genai.Generator(self.model, params)
        self.generator.append_tokens(np.asarray(ids_S, dtype=np.int32))
        return np.array(self.generator.get_logits()).reshape(-1)

    def step(self, token: int) -> np.ndarray:
        """Append one token, return its logits [V]."""
        self.generator.append_tokens(np.array([token], dtype=np.int32))
        return np.array(self.generator.get_logits()).reshape(-1)


MODELS = {"gguf": GgufModel, "onnx": OnnxModel}


def measure(model: Any, ids_S: Sequence[int], new_tokens: int, runs: int) -> dict[str, Any]:
    """Medians over runs after one full warm-up, every sample beside them."""
    ttft_ms, rates = [], []
    for run in range(runs + 1):
        started = time.perf_counter()
        token = int(model.prefill(ids_S).argmax())
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = int(model.step(token).argmax())
        last = time.perf_counter()
        if run:  # the first one warms up
            ttft_ms.append((first - started) * 1e3)
            rates.append((new_tokens - 1) / (last - first))
    return {
        "ttft_ms_p50": statistics.median(ttft_ms), "decode_tokens_per_s": statistics.median(rates), "runs": runs,
        "prompt_tokens": len(ids_S), "new_tokens": new_tokens, "ttft_ms": ttft_ms, "decode_tokens_per_s_runs": rates,
    }  # fmt: skip


def peak_rss_mib() -> float | None:
    """Largest resident memory of this process."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def at_least(least: int) -> Callable[[str], int]:
    """A type of argparse: whole numbers from `least` on."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


def arguments() -> argparse.Namespace:
    """The command line; argparse ends the process with 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=at_least(0), default=0, help="0 = the bundle's setting, or all cores")
    parser.add_argument("--gpu-layers", type=int, default=None, help="layers on the accelerator, -1 = all (GGUF)")
    parser.add_argument("--prompt-tokens", type=at_least(1), default=128)
    parser.add_argument("--new-tokens", type=at_least(2), default=64)
    parser.add_argument("--runs", type=at_least(1), default=5)
    parser.add_argument("--no-speed", action="store_true", help="only check files and quality")
    return parser.parse_args()


def main() -> int:
    """Check, score, measure, print; the exit code."""
    options, folder = arguments(), Path(__file__).resolve().parent
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    facts = {"bundle": manifest["summary"], "machine": platform.platform(), "python": sys.version.split()[0]}
    if faults := check_files(folder, manifest["files"]):
        return _report(facts | {"passed": False, "faults": faults}, 4)
    golden = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    try:
        result = facts | examine(folder, manifest, golden, options)
    except ImportError as missing:
        return _report(facts | {"passed": False, "faults": [f"not installed: {missing.name}"]}, 5)
    return _report(result, 0 if result["passed"] else 10)


def examine(
    folder: Path, manifest: dict[str, Any], golden: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Open the artifact, score the golden prompts and, unless told not to, measure the speed."""
    settings, summary = manifest["config"]["runtime"], manifest["summary"]
    threads = options.threads or settings["threads"] or os.cpu_count() or 1
    gpu_layers = settings["gpu_layers"] if options.gpu_layers is None else options.gpu_layers
    speed_tokens = max(1, min(options.prompt_tokens, settings["context_length"] - options.new_tokens))
    longest = max(len(prompt["ids"]) for prompt in golden["prompts"])
    context = max(longest, speed_tokens + options.new_tokens)
    model = MODELS[summary["format"]](folder / summary["artifact"], threads, context, gpu_layers)
    quality = score(golden["prompts"], model.logits)
    limit = golden["limit_kl_nats"]
    result = {"passed": quality["kl_nats"] <= limit, "quality": quality, "expected": golden["expected"]}
    if not options.no_speed:
        pool = [token for prompt in golden["prompts"] for token in prompt["ids"]]
        result["speed"] = measure(model, np.resize(pool, speed_tokens).tolist(), options.new_tokens, options.runs)
    return result | {
        "limit_kl_nats": limit, "threads": threads, "gpu_layers": gpu_layers, "peak_rss_mib": peak_rss_mib(),
    }  # fmt: skip


def _report(result: dict[str, Any], code: int) -> int:
    print(json.dumps(result, indent=1))
    return code


if __name__ == "__main__":
    sys.exit(main())
