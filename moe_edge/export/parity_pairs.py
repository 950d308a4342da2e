"""GGUF against ONNX: the two formats of one student must agree with each other, not only each with the student.

At full precision both must be the same function. The delivered, quantized files differ by both their quantization errors:
for small errors the square root of KL behaves like a distance, so KL(gguf || onnx) should not exceed
(sqrt(KL(student || gguf)) + sqrt(KL(student || onnx)))^2; twice that and a floor is the limit, beyond which the two errors
point in the same wrong direction of one of the files.

V vocabulary, S tokens.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_edge.contracts.errors import GateFailed
from moe_edge.metrics.quality import agreement, kl_per_token

FULL_PRECISION = ("gguf F16", "onnx fp32")
SLACK, FLOOR_NATS = 2.0, 1e-3


def agree(
    gguf: str, onnx: str, gguf_SV: np.ndarray, onnx_SV: np.ndarray, student_SV: np.ndarray,
    full: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One row of parity.json: KL(gguf || onnx) on the fixed text, gated.

    Args:
        gguf, onnx: the rows' names of the two artifacts.
        gguf_SV, onnx_SV, student_SV: logits on the same tokens.
        full: of two full-precision files the limits of the GGUF against the student; None: they are quantized.

    Raises:
        GateFailed: the two files are further apart than their own errors explain.
    """
    kl_S = kl_per_token(gguf_SV, onnx_SV)
    kl, median = float(kl_S.mean()), float(np.median(kl_S))
    own = [float(kl_per_token(student_SV, logits_SV).mean()) for logits_SV in (gguf_SV, onnx_SV)]
    limit = full["kl_nats"] if full else SLACK * sum(max(value, 0.0) ** 0.5 for value in own) ** 2 + FLOOR_NATS
    median_limit = full["median_kl_nats"] if full else None
    if not kl <= limit or (median_limit is not None and not median <= median_limit):
        why = f"KL is {kl:.2e} nats (median {median:.2e}), limit {limit:.2e}; against the student {own[0]:.2e} and {own[1]:.2e}"
        raise GateFailed(f"{gguf} and {onnx} disagree with each other", why=why)
    return {
        "pair": [gguf, onnx], "kl_nats": kl, "median_kl_nats": median,
        "top1_agreement": float(agreement(gguf_SV, onnx_SV).mean()),
        "kl_to_student_nats": own, "limit_kl_nats": limit, "limit_median_kl_nats": median_limit,
        "n_tokens": len(kl_S), "passed": True,
    }  # fmt: skip
