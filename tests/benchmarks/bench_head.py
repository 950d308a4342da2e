"""Cross-entropy and cached KL on the head: tiles, token chunks and plain autograd side by side, time and memory.

    python -m tests.benchmarks.bench_head [--sizes 8192,256 49152,576 151936,1024] [--tokens 512] [--repetitions 3]

Every form runs in a process of its own, because memory only grows within one; `above_start_mib` is the rise of the kernel's
high-water mark over inputs and head, gradients included. Losses and gradients of all forms must agree. One JSON line per size
and form, and one with the ratios.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_edge.distillation.losses import TokenLosses
from moe_edge.distillation.signal import TeacherSignal
from moe_edge.formulas.divergence import cached_kl, cross_entropy
from moe_edge.formulas.head_loss import head_loss
from moe_edge.formulas.logit_views import WholeLogits
from moe_edge.metrics.memory import high_water_bytes

K, WEIGHTS = 32, {"ce": 0.02, "kl": 0.98}
MIB = 2**20


def tiles(hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor, signal: TeacherSignal) -> Tensor:
    return TokenLosses(WEIGHTS, 1.0)(hidden_TD, head_VD, labels_T, [signal])[0]


def chunks(hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor, signal: TeacherSignal) -> Tensor:
    def chunk(logits_tV: Tensor, span: slice) -> dict[str, tuple[float, Tensor]]:
        parts = {"ce": cross_entropy(logits_tV, labels_T[span]), "kl": _kl(logits_tV, signal[span])}
        return {name: (WEIGHTS[name], value_t.sum()) for name, value_t in parts.items()}

    return head_loss(hidden_TD, head_VD, chunk)[0]


def whole(hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor, signal: TeacherSignal) -> Tensor:
    logits_TV = functional.linear(hidden_TD, head_VD)
    ce_T, kl_T = cross_entropy(logits_TV, labels_T), _kl(logits_TV, signal)
    return WEIGHTS["ce"] * ce_T.sum() + WEIGHTS["kl"] * kl_T.sum()


def _kl(logits_tV: Tensor, signal: TeacherSignal) -> Tensor:
    return cached_kl(WholeLogits(logits_tV), signal.indices_SK, signal.logprobs_SK, signal.tail_logmass_S)


FORMS: dict[str, Callable[..., Tensor]] = {"tiles": tiles, "token chunks": chunks, "plain autograd": whole}


def measure(form: str, tokens: int, vocab: int, width: int, repetitions: int) -> dict[str, Any]:
    """Seconds of a loss with its gradients (the best of some), the rise of memory, and numbers to compare forms by."""
    torch.manual_seed(0)
    hidden_TD = torch.randn(tokens, width).requires_grad_()
    head_VD = (torch.randn(vocab, width) * 3 / math.sqrt(width)).requires_grad_()
    labels_T = torch.randint(vocab, (tokens,))
    ids_TK = torch.rand(tokens, vocab // 8).topk(K, -1).indices * 8  # unique, all over the vocabulary
    heavy_TK = torch.log_softmax(torch.randn(tokens, K), -1) + math.log(0.9)
    signal = TeacherSignal(ids_TK, heavy_TK.sort(-1, descending=True).values, torch.full((tokens,), math.log(0.1)))
    start, seconds = high_water_bytes(), []
    for _ in range(repetitions):
        begun = time.perf_counter()
        loss = FORMS[form](hidden_TD, head_VD, labels_T, signal)
        slopes = torch.autograd.grad(loss, (hidden_TD, head_VD))
        seconds.append(time.perf_counter() - begun)
    peak = high_water_bytes()
    if start is None or peak is None:
        raise SystemExit("this system does not tell a process's peak memory")
    return {
        "name": "head", "form": form, "tokens": tokens, "vocab": vocab, "width": width, "seconds": round(min(seconds), 3),
        "above_start_mib": round((peak - start) / MIB, 1), "loss": loss.item(),
        "slopes": [float(slope.double().norm()) for slope in slopes],
    }  # fmt: skip


def compare(size: str, options: argparse.Namespace) -> None:
    lines = {}
    for form in FORMS:
        command = [sys.executable, "-m", "tests.benchmarks.bench_head", "--one", form, "--sizes", size]
        command += ["--tokens", str(options.tokens), "--repetitions", str(options.repetitions)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        lines[form] = json.loads(done.stdout)
        print(json.dumps(lines[form]), flush=True)
    plain = lines["plain autograd"]
    for form, line in lines.items():
        for ours, theirs in zip((line["loss"], *line["slopes"]), (plain["loss"], *plain["slopes"]), strict=True):
            if not math.isclose(ours, theirs, rel_tol=1e-4):
                raise SystemExit(f"{form}: {ours} is not {theirs}")
    ratios = {
        f"tiles over {form}, {key}": round(lines["tiles"][key] / lines[form][key], 3)
        for form in ("token chunks", "plain autograd")
        for key in ("seconds", "above_start_mib")
    }
    print(json.dumps({"name": "head_ratios", "size": size} | ratios), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["8192,256", "49152,576", "151936,1024"], metavar="V,D")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--one", choices=list(FORMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    for size in options.sizes:
        if options.one is None:
            compare(size, options)
            continue
        vocab, width = map(int, size.split(","))
        print(json.dumps(measure(options.one, options.tokens, vocab, width, options.repetitions)))


if __name__ == "__main__":
    main()
