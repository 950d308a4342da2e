"""Cached, live and sampled signals: one interface, the same numbers, and a clear refusal where there is nothing to say."""

from pathlib import Path

import pytest
import torch

from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.capture import CaptureConfig, captured_signal
from moe_edge.distillation.signal import CachedSignal, SampledSignal, TeacherSignal, joined
from moe_edge.distillation.teacher import HiddenSignal, LiveTeacher, teacher_model
from moe_edge.distillation.terms import Needs
from moe_edge.distillation.trainer import DistillationTrainer, RowDataset
from moe_edge.formulas.divergence import cached_kl, kl_dense, teacher_topk
from moe_edge.formulas.logit_views import WholeLogits
from moe_edge.formulas.sampling import draw
from moe_edge.models.loading import load_model
from moe_edge.storage.rows import TokenRows
from tests.distillation.parts import TOKENS, VOCAB, rows, teacher_of, tiny_student, tiny_teacher, write_cache
from tests.distillation.test_trainer import arguments
from tests.tiny import tiny_checkpoint


def logits(model, ids_BS):
    with torch.no_grad():
        return model(ids_BS).logits


def test_a_live_teacher_is_dense_and_equals_the_model(tmp_path: Path) -> None:
    ids_BS = torch.from_numpy(rows()[:3]).long()
    live = LiveTeacher(teacher_model(tiny_checkpoint(tmp_path, "olmoe"), torch.device("cpu")), Needs())
    expected = logits(live.model, ids_BS)
    for row_SV, expected_SV in zip(live.logits(ids_BS), expected, strict=True):
        torch.testing.assert_close(row_SV, expected_SV, rtol=1e-4, atol=1e-4)
    assert [row_SV.shape for row_SV in live.logits(ids_BS, 90)] == [(TOKENS, 90)] * 3
    assert not any(parameter.requires_grad for parameter in live.model.parameters())


def test_rows_of_a_micro_batch_run_once() -> None:
    live, calls = LiveTeacher(tiny_teacher(), Needs()), []
    live.model.model.register_forward_hook(lambda *_: calls.append(1))
    ids_BS = torch.from_numpy(rows()[:3]).long()
    for row_SV in live.logits(ids_BS):
        assert row_SV.shape == (TOKENS, VOCAB)
    assert len(calls) == 1
    list(live.logits(ids_BS))
    assert len(calls) == 1  # the same micro-batch, answered from memory
    list(live.logits(ids_BS + 1))
    assert len(calls) == 2


def test_cached_and_live_pairs_give_their_kls(tmp_path: Path) -> None:
    teacher, student = tiny_teacher(), tiny_student()
    write_cache(tmp_path / "l.h5", teacher, rows())
    ids_S = torch.from_numpy(rows()[0]).long()
    student_SV = logits(student, ids_S[None])[0]
    whole = live_signal(teacher, ids_S, 90)
    torch.testing.assert_close(
        whole.forward_kl(WholeLogits(student_SV[:, :90]), 2.0),
        kl_dense(logits(teacher, ids_S[None])[0], student_SV, 2.0, 90),
    )
    cached = CachedSignal(tmp_path / "l.h5", {}).signal(ids_S, 2.0)
    student = WholeLogits(student_SV)
    ours = cached.forward_kl(student, 2.0)
    assert torch.equal(ours, cached_kl(student, cached.indices_SK, cached.logprobs_SK, cached.tail_logmass_S, 2.0))
    assert (ours <= live_signal(teacher, ids_S).forward_kl(student, 2.0) + 1e-3).all()


def live_signal(teacher, ids_S: torch.Tensor, vocab: int | None = None) -> HiddenSignal:
    live = LiveTeacher(teacher, Needs())
    return live.signal(live.run(ids_S[None]), torch.ones(1, len(ids_S), dtype=torch.bool), vocab)


def forms(tokens: int = 6) -> list:
    teacher_TV = torch.randn(tokens, 40)
    top = teacher_topk(teacher_TV, 8, (2.0,))
    return [
        TeacherSignal(top.indices_TK, top.logprobs_TK, top.tail_logmass_TH[:, 0]),
        SampledSignal(*draw(teacher_TV, 20, 2.0, torch.Generator().manual_seed(tokens))),
    ]


@pytest.mark.parametrize("form", range(2))
def test_slices_masks_and_joins_keep_their_form_and_numbers(form: int) -> None:
    first, second = forms(6)[form], forms(4)[form]
    student = torch.randn(10, 40)
    both = joined([first, second])
    assert type(both) is type(first)
    whole = both.forward_kl(WholeLogits(student), 2.0)
    torch.testing.assert_close(whole[:6], first.forward_kl(WholeLogits(student[:6]), 2.0))
    torch.testing.assert_close(whole[6:], second.forward_kl(WholeLogits(student[6:]), 2.0))
    mask = torch.arange(10) % 3 > 0
    for chosen in (slice(3, 8), mask):
        torch.testing.assert_close(both[chosen].forward_kl(WholeLogits(student[chosen]), 2.0), whole[chosen])


def test_draws_refuse_every_other_divergence() -> None:
    with pytest.raises(ConfigError, match="forward KL only"):
        forms()[1].pair(WholeLogits(torch.randn(6, 40)), 2.0)


def test_the_trainer_takes_every_source(tmp_path: Path) -> None:
    write_cache(tmp_path / "l.h5", tiny_teacher(), rows())
    folder = tiny_checkpoint(tmp_path, "qwen3_moe", experts=4, layers=3, hidden=32, width=16)
    ids_NS = rows()[:4]
    drawn = captured_signal(
        teacher_of(folder),
        TokenRows(ids_NS, ids_NS.size),
        tmp_path / "rs",
        CaptureConfig(draws=200, temperatures=(2.0,)),
    )
    first = {}
    for name, source in (
        ("cached", {"signal": CachedSignal(tmp_path / "l.h5", {})}),
        ("live", {"teacher": LiveTeacher(tiny_teacher(), Needs())}),
        ("drawn", {"signal": drawn}),
    ):
        student = tiny_student() if name != "drawn" else load_model(folder)
        settings = arguments(tmp_path / name, distillation_alpha=1.0, loss_weights={"kl": 1.0})
        trainer = DistillationTrainer(student, settings, RowDataset(ids_NS), **source)
        trainer.train()
        first[name] = trainer.state.log_history[0]["kl_loss"]
    ids_BS = torch.from_numpy(ids_NS).long()
    p_BSV, q_BSV = logits(tiny_teacher(), ids_BS)[:, :-1], logits(tiny_student(), ids_BS)[:, :-1]
    whole = float(kl_dense(p_BSV.flatten(0, 1), q_BSV.flatten(0, 1), 2.0).mean())
    assert first["live"] == pytest.approx(whole, rel=1e-3)
    assert 0.3 * whole < first["cached"] < whole
    assert abs(first["drawn"]) < 0.1  # its student is its teacher: the estimate of 0, from 200 draws at 60 tokens
