"""Rows that the student writes: the same for the same seed, labels, lengths, repetition, empty rows, and the share."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_edge.contracts.config import OnPolicyConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.distillation.checkpoints import load_extras, save_extras
from moe_edge.distillation.rollouts import (
    Rollouts,
    UnpaddedRow,
    chosen_batches,
    new_tokens_at,
    padded,
    prompt_length,
    rows_of,
    until_end,
)
from moe_edge.formulas.divergence import IGNORED_LABEL
from tests.distillation.parts import rows, tiny_student
from tests.tiny import tiny_model

END = 2  # of the tiny models


def batches(count: int = 4, per_batch: int = 2) -> list[dict[str, torch.Tensor]]:
    ids = torch.from_numpy(rows()).long()
    return [
        {"input_ids": part, "labels": part} for part in ids[: count * per_batch].split(per_batch)
    ]  # as RowDataset's rows are collated


def policy(**values: Any) -> OnPolicyConfig:
    return OnPolicyConfig(**({"prompt_tokens": 6, "new_tokens": (4, 10), "max_repetition": 1.0} | values))


def test_labels_prompts_and_lengths() -> None:
    given = batches()
    made = Rollouts(tiny_student(), policy(share=1.0), steps=3, seed=1)(given, 2)
    for old, new in zip(given, made, strict=True):
        ids, labels, mask = new["input_ids"], new["labels"], new["attention_mask"]
        assert int(new["rollout"]) == 1 and ids.shape == labels.shape == mask.shape and ids.shape[1] <= 16
        assert torch.equal(ids[:, :6], old["input_ids"][:, :6]) and (labels[:, :6] == IGNORED_LABEL).all()
        written = mask.bool() & (torch.arange(ids.shape[1]) >= 6)
        assert torch.equal(labels[written], ids[written]) and (labels[~written] == IGNORED_LABEL).all()
        assert (mask.diff(dim=1) <= 0).all() and ids[written].ne(END).sum() > 0


def test_the_same_seed_and_step_write_the_same_rows_whatever_came_before() -> None:
    student = tiny_student()
    first = Rollouts(student, policy(), 4, seed=3)(batches(), 1)
    torch.manual_seed(99)
    hook = Rollouts(student, policy(), 4, seed=3)
    hook(batches(), 0)
    again = hook(batches(), 1)
    assert [sorted(batch) for batch in first] == [sorted(batch) for batch in again]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, again, strict=True) for name in a)
    for seed, step in ((4, 1), (3, 2)):
        other = Rollouts(student, policy(share=1.0), 4, seed=seed)(batches(), step)
        same = Rollouts(student, policy(share=1.0), 4, seed=3)(batches(), 1)
        assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(same, other, strict=True))


def test_steps_that_share_a_batch_share_what_was_written(tmp_path: Path) -> None:
    student, given = tiny_student(), batches()
    hook = Rollouts(student, policy(), 6, seed=3, repeats=2)
    made = []
    for step in range(4):
        made.append(hook(given, step))
        with torch.no_grad():  # an update; what was written stays all the same
            student.lm_head.weight.normal_(generator=torch.Generator().manual_seed(step))
        if step == 2:
            save_extras(tmp_path, {"rollouts": hook})
    for first, second in ((made[0], made[1]), (made[2], made[3])):
        assert [index for index in range(4) if "rollout" in first[index]] == [
            index for index in range(4) if first[index] is not given[index]
        ]
        assert all(a is b for a, b in zip(first, second, strict=True))
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(made[0], made[2], strict=True))
    resumed = Rollouts(student, policy(), 6, seed=3, repeats=2)
    load_extras(tmp_path, {"rollouts": resumed})
    again = resumed(given, 3)
    assert [sorted(batch) for batch in again] == [sorted(batch) for batch in made[3]]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(again, made[3], strict=True) for name in a)
    assert resumed.read()["rollout_tokens"] == 0


def test_student_and_random_state_are_left_as_they_were() -> None:
    student = tiny_student().train()
    student.generation_config.repetition_penalty = 5.0
    own, weights, state = student.generation_config, copy.deepcopy(student.state_dict()), torch.get_rng_state()
    made = Rollouts(student, policy(share=1.0), 4, seed=0)(batches(), 0)
    assert student.training and student.generation_config is own and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], value) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())
    student.generation_config.repetition_penalty = 1.0
    plain = Rollouts(student, policy(share=1.0), 4, seed=0)(batches(), 0)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(made, plain, strict=True))


@pytest.mark.parametrize(("share", "count"), ((0.5, 4), (0.25, 1), (0.3, 3), (1.0, 2)))
def test_the_share_is_met_over_the_steps(share: float, count: int) -> None:
    chosen = [chosen_batches(count, step, share, seed=0) for step in range(40)]
    assert sum(map(len, chosen)) == int(40 * count * share + 1e-9)
    assert max(map(len, chosen)) - min(map(len, chosen)) <= 1
    assert all(ids == sorted(set(ids)) and set(ids) <= set(range(count)) for ids in chosen)
    assert chosen == [chosen_batches(count, step, share, seed=0) for step in range(40)]
    assert share == 1.0 or len({index for ids in chosen for index in ids}) == count


def test_only_the_chosen_batches_are_replaced() -> None:
    given = batches()
    made = Rollouts(tiny_student(), policy(share=0.5), 4, seed=0)(given, 0)
    assert [index for index in range(4) if "rollout" in made[index]] == chosen_batches(4, 0, 0.5, 0)
    assert all(made[i] is given[i] for i in range(4) if "rollout" not in made[i])


def test_rollouts_grow_from_the_first_step_to_the_last() -> None:
    assert [new_tokens_at(step, 5, (4, 12)) for step in range(5)] == [4, 6, 8, 10, 12]
    assert new_tokens_at(0, 1, (4, 12)) == 4 and new_tokens_at(9, 5, (4, 12)) == 12


def steered(token_after: dict[int, int]) -> Any:
    """A model that after a token says one other with near certainty, whatever stood before."""
    student = tiny_model("qwen3_moe", experts=3, layers=1, hidden=32, width=16, vocab=96, tied=False)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "layers." in name and "norm" not in name:
                parameter.zero_()
        student.model.norm.weight.fill_(1)
        student.model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(0))
        student.lm_head.weight.zero_()
        for before, after in token_after.items():
            student.lm_head.weight[after] += 40 * student.model.embed_tokens.weight[before]
    return student


def one_batch(*ids: list[int]) -> list[dict[str, torch.Tensor]]:
    tensor = torch.tensor(ids)
    return [{"input_ids": tensor, "labels": tensor}]


def test_a_repeated_end_is_cut_and_counted() -> None:
    circle = steered({10: 11, 11: 12, 12: 13, 13: 11})
    hook = Rollouts(circle, policy(share=1.0, prompt_tokens=2, new_tokens=(12, 12), max_repetition=0.5), 1, seed=0)
    (made,) = hook(one_batch([5, 10, 20, 21]), 0)
    assert made["input_ids"].tolist() == [[5, 10, 11, 12, 13]]
    assert made["labels"].tolist() == [[IGNORED_LABEL, IGNORED_LABEL, 11, 12, 13]]
    counts = hook.read()
    assert counts["rollout_repeated"] == 1 and counts["rollout_tokens"] == 3 and counts["rollout_seconds"] > 0
    assert set(hook.read().values()) == {0.0}
    lenient = Rollouts(circle, policy(share=1.0, prompt_tokens=2, new_tokens=(12, 12)), 1, seed=0)
    assert lenient(one_batch([5, 10, 20, 21]), 0)[0]["input_ids"].shape == (1, 14)


def test_an_empty_row_is_the_original_one_and_counted() -> None:
    ends = steered({10: END, 30: 31, 31: END})
    hook = Rollouts(ends, policy(share=1.0, prompt_tokens=2), 1, seed=0)
    (made,) = hook(one_batch([5, 10, 20, 21, 22], [6, 30, 23, 24, 25]), 0)
    assert made["input_ids"].tolist() == [[5, 10, 20, 21, 22], [6, 30, 31, END, END]]
    assert made["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 1, 0]]
    assert made["labels"].tolist()[0] == [5, 10, 20, 21, 22]
    assert made["labels"].tolist()[1] == [IGNORED_LABEL, IGNORED_LABEL, 31, END, IGNORED_LABEL]
    assert hook.read()["rollout_empty"] == 1
    given = one_batch([5, 10, 20, 21, 22])
    assert hook(given, 0)[0] is given[0] and hook.read()["rollout_tokens"] == 0


def test_prompts_of_rows_that_mark_their_answer_and_of_short_ones() -> None:
    ids = torch.arange(3, 13)
    marked = UnpaddedRow(ids, torch.where(torch.arange(10) < 7, IGNORED_LABEL, ids))
    assert prompt_length(marked, 4) == 7
    assert prompt_length(UnpaddedRow(ids, ids), 4) == 4 and prompt_length(UnpaddedRow(ids[:3], ids[:3]), 4) == 3
    first_ignored = UnpaddedRow(ids, torch.where(torch.arange(10) < 1, IGNORED_LABEL, ids))
    assert prompt_length(first_ignored, 4) == 4
    batch = padded([marked, UnpaddedRow(ids[:3], ids[:3])], pad=0)
    assert [row.ids_S.tolist() for row in rows_of(batch)] == [ids.tolist(), ids[:3].tolist()]


def test_padding_on_the_left_of_a_prompt_changes_nothing() -> None:
    follows = steered({10: 11, 11: 12, 12: 40, 40: 41, 41: 42, 50: 51, 51: 52, 52: 53, 53: 54})
    short, long = torch.tensor([5, 10]), torch.tensor([6, 7, 8, 50])
    batch = padded([UnpaddedRow(ids, ids) for ids in (short, long)], pad=0)
    (made,) = Rollouts(follows, policy(share=1.0, new_tokens=(4, 4)), 1, seed=0)([batch], 0)
    assert made["input_ids"].tolist() == [[5, 10, 11, 12, 40, 41, END, END], [6, 7, 8, 50, 51, 52, 53, 54]]
    assert made["attention_mask"].sum(-1).tolist() == [6, 8]


def test_texts_end_with_their_end() -> None:
    assert until_end(torch.tensor([5, 2, 7]), [2, 3]).tolist() == [5, 2]
    assert until_end(torch.tensor([5, 6]), []).tolist() == [5, 6]


def test_rollouts_without_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="a token at least"):
        Rollouts(tiny_student(), policy(new_tokens=(0, 4)), 1, seed=0)
