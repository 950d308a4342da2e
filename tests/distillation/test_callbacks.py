"""What a stage tells at its end: advice only where one part of the blend is far above the other."""

from pathlib import Path

import pytest

import moe_edge.distillation as public
from moe_edge.distillation.callbacks import balance_advice
from moe_edge.distillation.signal import CachedSignal
from moe_edge.distillation.teacher import LiveTeacher
from moe_edge.distillation.trainer import DistillationTrainer, DistillationTrainingArguments, Parts, RowDataset


@pytest.mark.parametrize(
    ("ce", "kl", "word"), ((3.0, 0.1, "larger distill.alpha"), (0.1, 3.0, "smaller distill.alpha"), (3.0, 1.0, None))
)
def test_advice_names_the_direction(ce: float, kl: float, word: str | None) -> None:
    history = [{"ce_loss": 1.0, "kl_loss": 1.0}] * 12 + [{"ce_loss": ce, "kl_loss": kl}] * 4
    advice = balance_advice(history)
    assert (advice is None) if word is None else (word in str(advice))


def test_a_stage_without_a_blend_has_nothing_to_balance() -> None:
    assert balance_advice([{"kl_loss": 1.0}] * 4) is None and balance_advice([]) is None


def test_the_trainer_and_what_it_is_given_are_public() -> None:
    homes = (CachedSignal, DistillationTrainer, DistillationTrainingArguments, LiveTeacher, Parts, RowDataset)
    assert [getattr(public, name) for name in public.__all__] == list(homes)
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        public.Trainer  # noqa: B018


def test_reports_and_progress_bars_are_off_until_they_are_asked_for(tmp_path: Path) -> None:
    quiet = DistillationTrainingArguments(output_dir=str(tmp_path))
    assert (quiet.report_to, quiet.disable_tqdm, quiet.logging_nan_inf_filter) == ([], True, False)
    wanted = {"report_to": "tensorboard", "disable_tqdm": False, "logging_nan_inf_filter": True}
    loud = DistillationTrainingArguments(output_dir=str(tmp_path), **wanted)
    assert (loud.report_to, loud.disable_tqdm, loud.logging_nan_inf_filter) == (["tensorboard"], False, True)
    assert not quiet.remove_unused_columns and not loud.remove_unused_columns
