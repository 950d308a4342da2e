"""Runs from the middle of a model: the same KL as whole runs, nothing left behind, the work counted."""

import pytest
import torch

from moe_edge.models.taps import decoder_layers, recorded_outputs
from moe_edge.planning.partial_runs import Meter, TrialRows, resumed
from moe_edge.planning.scoring import masked_kl_rows
from tests.tiny import ALL_FAMILIES, tiny_ids, tiny_model

BASE = {layer: [0, 1, 2, 3, 5] for layer in range(4)}


def changed(first: int) -> dict[int, list[int]]:
    return {layer: ids if layer < first else [0, 2, 3, 4, 5] for layer, ids in BASE.items()}


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_run_from_the_middle_gives_the_kl_of_a_whole_run(first):
    model, ids = tiny_model("qwen3_moe", layers=4), tiny_ids(rows=3)
    rows = TrialRows(model, ids, None, Meter(model))
    base, outputs = rows.run(BASE)
    rows.adopt(outputs)
    trial, upper = rows.run(changed(first), first)
    expected = masked_kl_rows(model, [BASE, changed(first)], ids)
    torch.testing.assert_close(base.view(3, -1).mean(1), expected[0], atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(trial.view(3, -1).mean(1), expected[1], atol=1e-7, rtol=1e-5)
    assert sorted(upper) == list(range(first, 4)), "only the layers that ran"
    assert not any("forward" in layer.__dict__ for layer in decoder_layers(model))
    assert not any(layer._forward_hooks for layer in decoder_layers(model))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_can_be_resumed(family):
    """Dense layers first, convolutions, latent attention, tuples: masks and tables stay the model's own."""
    model = tiny_model(family, layers=3)
    layers, ids, outputs = decoder_layers(model), tiny_ids(rows=2), {}
    with torch.no_grad(), recorded_outputs(layers, outputs):
        whole = model(ids, use_cache=False).logits
    with torch.no_grad(), resumed(layers, 2, outputs):
        again = model(ids, use_cache=False).logits
    torch.testing.assert_close(again, whole, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, whole, atol=0, rtol=0)


def test_a_lower_top_k_is_part_of_a_trial():
    model, ids = tiny_model("qwen3_moe"), tiny_ids()
    kept = {0: [0, 1, 2], 1: [3, 4, 5]}
    found, _ = TrialRows(model, ids, 1, Meter(model)).run(kept)
    expected = masked_kl_rows(model, [kept], ids, top_k=1)[0].mean()
    assert float(found.mean()) == pytest.approx(float(expected), rel=1e-5)


def test_the_work_is_counted_in_forward_passes():
    model = tiny_model("qwen3_moe", layers=4)
    meter, ids = Meter(model), tiny_ids(tokens=10, rows=2)
    rows = TrialRows(model, ids, None, meter)
    assert meter.spent == 20
    _, outputs = rows.run(BASE)
    rows.adopt(outputs)
    assert meter.spent == pytest.approx(40)
    rows.run(changed(2), 2)
    assert meter.spent == pytest.approx(40 + 20 * (meter.head_share + (1 - meter.head_share) / 2))
    assert 0 < meter.head_share < 1 and 0 < meter.experts_share < 3
