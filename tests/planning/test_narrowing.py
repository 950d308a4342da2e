"""Predicting a width: masked neurons give the KL of really narrowed experts, in memory and streamed."""

import pytest
import torch

from moe_edge.compression.surgery import apply_plan
from moe_edge.compression.width import Narrowing
from moe_edge.models.loading import load_model
from moe_edge.models.streaming import StreamedModel
from moe_edge.models.views import moe_layers
from moe_edge.planning.scoring import masked_kl_rows, streamed_masked_kl_rows
from tests.compression.action_helpers import KEPT, kl_nats, log_probabilities, material, plan_of
from tests.tiny import tiny_checkpoint, tiny_ids, tiny_model

IDS = tiny_ids(tokens=20, rows=3, seed=5)


@pytest.mark.parametrize(("family", "top_k"), [("qwen3_moe", 1), ("qwen2_moe", 2), ("mixtral", 1), ("olmoe", 2)])
def test_masked_neurons_predict_the_narrowed_model(family, top_k):
    teacher, student = (tiny_model(family, width=64) for _ in range(2))
    given = material(teacher)
    apply_plan(student, plan_of(KEPT, expert_width=32, top_k=top_k), given)
    expected = kl_nats(log_probabilities(teacher, IDS), log_probabilities(student, IDS))
    neurons = Narrowing(given.statistics.imatrix["expert_down"], 32)
    found = masked_kl_rows(teacher, [KEPT], IDS, top_k, neurons.mask)
    assert float(found.mean()) == pytest.approx(expected, rel=1e-4) and expected > 1e-3
    wider = masked_kl_rows(teacher, [KEPT], IDS, top_k)
    assert not torch.allclose(found, wider, rtol=1e-3)
    masks = [neurons.mask(view) for view in moe_layers(teacher)]
    assert all(mask_EF.sum(dim=1).tolist() == [32] * 6 for mask_EF in masks)


def test_a_streamed_teacher_gives_the_same_number(tmp_path):
    folder = tiny_checkpoint(tmp_path, "qwen3_moe", with_tokenizer=False, width=64, dtype=torch.bfloat16)
    model = load_model(folder)
    sums = material(model).statistics.imatrix["expert_down"]
    expected = masked_kl_rows(model, [KEPT, {}], IDS, 1, Narrowing(sums, 32).mask)
    for compact in (False, True):
        streamed = StreamedModel(folder, compact=compact)
        found = streamed_masked_kl_rows(streamed, [KEPT, {}], IDS, tmp_path, 1, Narrowing(sums, 32).mask)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
