"""Advice on the blend: only where one part is far above the other, judged on the end of the stage."""

import pytest

import moe_edge.distillation as public
from moe_edge.distillation.advice import balance_advice
from moe_edge.distillation.trainer import DistillationTrainer


@pytest.mark.parametrize(
    ("ce", "kl", "word"), ((3.0, 0.1, "larger distill.alpha"), (0.1, 3.0, "smaller distill.alpha"), (3.0, 1.0, None))
)
def test_advice_names_the_direction(ce: float, kl: float, word: str | None) -> None:
    history = [{"ce_loss": 1.0, "kl_loss": 1.0}] * 12 + [{"ce_loss": ce, "kl_loss": kl}] * 4
    advice = balance_advice(history)
    assert (advice is None) if word is None else (word in str(advice))


def test_a_stage_without_a_blend_has_nothing_to_balance() -> None:
    assert balance_advice([{"kl_loss": 1.0}] * 4) is None and balance_advice([]) is None


def test_the_trainer_is_public() -> None:
    assert public.DistillationTrainer is DistillationTrainer
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        public.Trainer  # noqa: B018
