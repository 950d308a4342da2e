"""The blend: limits at alpha 0 and 1, T squared, and what is not computed."""

import pytest
import torch

from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.losses import TokenLosses, active_weights
from moe_edge.distillation.signal import TeacherSignal
from moe_edge.formulas.divergence import cached_kl, teacher_topk
from moe_edge.formulas.logit_views import WholeLogits

WEIGHTS = {"ce": 1.0, "kl": 1.0, "cka": 0.05}


def test_limits_skip_the_other_branch() -> None:
    assert active_weights(WEIGHTS, 0.0, 2.0) == {"ce": 1.0, "cka": 0.05}
    assert active_weights(WEIGHTS, 1.0, 2.0) == {"kl": 4.0, "cka": 0.05}
    assert active_weights({"ce": 2, "kl": 1}, 0.25, 3.0) == {"ce": 1.5, "kl": 2.25}


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no loss"):
        active_weights({"ce": 1.0}, 1.0, 2.0)
    with pytest.raises(ConfigError, match="negative"):
        active_weights({"ce": -1.0}, 0.0, 2.0)


def test_blend_equals_its_formula() -> None:
    hidden, head, labels = torch.randn(20, 8), torch.randn(50, 8), torch.randint(0, 50, (20,))
    top = teacher_topk(torch.randn(20, 50), 8, (2.0,))
    signal = TeacherSignal(top.indices_TK, top.logprobs_TK, top.tail_logmass_TH[:, 0])
    weights = active_weights({"ce": 1, "kl": 1}, 0.3, 2.0)
    loss, sums = TokenLosses(weights, 2.0)(hidden, head, labels, [signal])
    logits = hidden @ head.T
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    kl = cached_kl(WholeLogits(logits), top.indices_TK, top.logprobs_TK, top.tail_logmass_TH[:, 0], 2.0).sum()
    torch.testing.assert_close(loss, 0.7 * ce + 0.3 * 4 * kl)
    assert sums == pytest.approx({"ce": float(ce), "kl": float(kl)}, rel=1e-5)
