"""What an action adds to a plan."""

from pathlib import Path
from typing import Any

import pytest

from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.plan import Plan
from moe_edge.planning.document import with_action
from moe_edge.planning.headers import model_headers
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.compression.action_helpers import HALF, material, plan8, planted
from tests.planning import plan_helpers
from tests.tiny import tiny_checkpoint


def completed(
    tmp_path: Path, *settings: str, cka_tokens: int = 100, plan: Plan | None = None, held_whole: bool = True
) -> Plan:
    folder = tiny_checkpoint(tmp_path, "qwen3_moe", experts=8, top_k=4, width=64)
    stats = material(planted("permuted")).statistics
    stats.cka_tokens, stats.counts_LE = cka_tokens, stats.imatrix["expert_count"]
    for name in ("gate_sum_LE", "norm_sum_LE", "norm_sq_sum_LE", "gated_norm_sum_LE"):
        setattr(stats, name, stats.counts_LE.double())
    spec = model_headers(inspect_checkpoint(folder)).spec
    return with_action(plan or plan8(), plan_helpers.config(*settings), spec, lambda: stats, held_whole)


def test_drop_alone_adds_nothing(tmp_path):
    assert completed(tmp_path, "plan.compensate=false") == plan8()


def test_what_is_left_is_refitted_unless_it_cannot_be(tmp_path):
    assert completed(tmp_path).compensate and "refitted" in completed(tmp_path).notes[-1]
    assert not completed(tmp_path, "plan.action=shared-core").compensate
    assert not completed(tmp_path, held_whole=False).compensate


def test_a_merge_gets_its_pairs_and_says_what_is_predicted(tmp_path):
    plan = completed(tmp_path, "plan.action=merge", "plan.sequential=true", "plan.action_tokens=512")
    assert plan.merges == {layer: {4: 0, 5: 1, 6: 2, 7: 3} for layer in (0, 1)}
    assert (plan.action, plan.sequential, plan.action_tokens, plan.fits) == ("merge", True, 512, True)
    assert "CKA proposes 8 merges for 8 dropped experts" in plan.notes[0] and plan.predicted_kl_nats == 0.1


def test_a_dense_student_takes_one_of_each_pair(tmp_path):
    odd = {layer: [0, 4, 5, 6] for layer in (0, 1)}  # a choice that holds a copy
    plan = completed(tmp_path, "plan.action=dense", plan=plan8(kept=odd))
    assert all({expert % 4 for expert in ids} == {0, 1, 2, 3} for ids in plan.kept.values())
    assert plan.criterion == "cka-dopt" and plan.predicted_kl_nats is None and "qwen3 checkpoint" in plan.notes[0]
    named = completed(tmp_path, "plan.action=dense", "plan.criterion=reap", plan=plan8(kept=odd))
    assert named.kept == odd and named.criterion == "frequency"


def test_shared_core_width_and_refits_say_what_they_mean(tmp_path):
    plan = completed(tmp_path, "plan.action=shared-core", "plan.shared_rank=5", "plan.expert_width=32")
    assert (plan.shared_rank, plan.expert_width, plan.predicted_kl_nats) == (5, 32, None)
    assert "folds it" in plan.notes[0] and "32 of 64 neurons" in plan.notes[1] and "no multiple of 256" in plan.notes[1]
    plan = completed(tmp_path, "plan.compensate=true", "plan.expert_width=64")
    assert plan.compensate and plan.expert_width is None and len(plan.notes) == 1


@pytest.mark.parametrize("action", ["merge", "dense"])
def test_actions_that_choose_by_cka_need_it(tmp_path, action):
    with pytest.raises(ConfigError, match="needs a profile with CKA"):
        completed(tmp_path, f"plan.action={action}", cka_tokens=0)


def test_nothing_dropped_needs_no_statistics(tmp_path):
    whole: dict[str, Any] = {"kept": {layer: list(range(8)) for layer in HALF}, "experts_kept": 8, "top_k": 4}
    plan = completed(tmp_path, "plan.action=merge", cka_tokens=0, plan=plan8(**whole))
    assert plan.merges == {} and not plan.fits and not plan.alters
