"""Measured sensitivity: the model is untouched, the numbers are those of a model that was really quantized."""

import pytest
import torch

from moe_edge.contracts.quantization import CODEBOOK_LEVELS, LEVELS, type_for_row
from moe_edge.families import FAMILIES
from moe_edge.models.weights import WeightRows, weight_rows
from moe_edge.planning import sensitivity
from moe_edge.planning.scoring import row_kl
from moe_edge.planning.sensitivity import codebooks_suit, importance_of, measure_sensitivity, sensitivity_of
from moe_edge.runtimes.ggml_quants import round_trip
from tests.planning.plan_helpers import config
from tests.tiny import tiny_ids, tiny_model

SIZES = {"hidden": 256, "width": 256, "experts": 4}


def test_the_model_is_put_back_bit_by_bit_and_cells_are_complete():
    model = tiny_model("qwen2_moe", layers=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    known = measure_sensitivity(model, tiny_ids(), threads=2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    names = ("attention", "shared", "expert_gate_up", "expert_down")
    assert set(known.nats) == {(name, third) for name in names for third in range(3)} | {("embedding_head", 0)}
    assert known.source == "measured" and known.tokens == 48
    assert all(set(table) == set(LEVELS) and min(table.values()) >= 0 for table in known.nats.values())


def test_coarser_types_cost_more_and_threads_change_nothing():
    model = tiny_model("qwen3_moe", layers=2, **SIZES)
    known = measure_sensitivity(model, tiny_ids(), threads=1)
    for name in ("attention", "expert_gate_up", "expert_down"):
        sums = [known.nats[name, 0][level] + known.nats[name, 1][level] for level in LEVELS]
        assert sums == sorted(sums, reverse=True) and sums[0] > 10 * sums[-1] > 0, name
    assert measure_sensitivity(model, tiny_ids(), threads=3).nats == known.nats


def test_a_class_costs_what_a_model_with_that_class_quantized_loses(monkeypatch):
    """Without the correction for overlap, a class's thirds add up to the KL of quantizing it."""
    teacher, student, ids = tiny_model("qwen3_moe", **SIZES), tiny_model("qwen3_moe", **SIZES), tiny_ids()
    monkeypatch.setattr(sensitivity.QuantizationProbe, "overlap", lambda *_args: 1.0)
    known = measure_sensitivity(teacher, ids)
    for matrix in weight_rows(student):
        if matrix.bit_class == "expert_down":
            for rows in matrix.rows:
                rows.copy_(torch.from_numpy(round_trip("Q2_K", rows.numpy())))
    with torch.no_grad():
        expected = float(row_kl(teacher(ids).logits, student(ids).logits).mean())
    measured = sum(known.nats["expert_down", third]["Q2_K"] for third in range(2))
    assert measured == pytest.approx(expected, rel=1e-4) and expected > 0


def test_overlap_scales_every_class_by_what_all_of_them_cost_together():
    model, ids = tiny_model("qwen3_moe", **SIZES), tiny_ids()
    known = measure_sensitivity(model, ids)
    for matrix in weight_rows(model):
        rows = matrix.rows if matrix.rows.dim() == 3 else matrix.rows[None]
        kind = type_for_row("Q4_K", rows.shape[-1])
        for part in rows:
            part.copy_(torch.from_numpy(round_trip(kind, part.numpy())))
    with torch.no_grad():
        expected = float(row_kl(tiny_model("qwen3_moe", **SIZES)(ids).logits, model(ids).logits).mean())
    total = sum(table["Q4_K"] for table in known.nats.values())
    assert total == pytest.approx(expected, rel=1e-4) or total < expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_measured(family):
    known = measure_sensitivity(tiny_model(family, vocab=128), tiny_ids(8, 1, vocab=128))
    experts = sum(table["Q2_K"] for (name, _), table in known.nats.items() if name == "expert_down")
    assert experts > 0 and all(table["Q8_0"] >= 0 for table in known.nats.values())


def sums(layers, experts, width, hidden):
    """The profile's sums of a model in which every column is as important as its neighbours."""
    return {
        "expert_in": torch.ones(layers, experts, hidden),
        "expert_down": torch.ones(layers, experts, width),
        "expert_count": torch.ones(layers, experts),
        "dense_count": torch.tensor(1.0),
    }


def test_codebooks_are_offered_to_experts_whose_importance_is_known():
    model, ids = tiny_model("qwen3_moe", layers=1, top_k=1, **(SIZES | {"experts": 1})), tiny_ids(8, 1)
    imatrix = sums(1, 1, 256, 256)
    known = measure_sensitivity(model, ids, imatrix)
    for name in ("expert_gate_up", "expert_down"):
        assert set(known.levels((name, 0))) == {*LEVELS, *CODEBOOK_LEVELS}
        table = known.nats[name, 0]
        assert table["IQ2_S"] > table["IQ3_XXS"] > table["IQ4_XS"] > table["Q5_K"] > 0
    assert set(known.levels(("attention", 0))) == set(LEVELS)
    del imatrix["expert_down"]
    partly = measure_sensitivity(model, ids, imatrix)
    assert "IQ2_S" in partly.levels(("expert_gate_up", 0)) and "IQ2_S" not in partly.levels(("expert_down", 0))
    for without in (measure_sensitivity(model, ids), measure_sensitivity(model, ids, imatrix, codebooks=False)):
        assert all(set(table) == set(LEVELS) for table in without.nats.values())


def test_what_is_measured_with_a_codebook_is_that_codebook(monkeypatch):
    sizes = SIZES | {"experts": 2, "layers": 1}
    model, student, ids = tiny_model("qwen3_moe", **sizes), tiny_model("qwen3_moe", **sizes), tiny_ids()
    monkeypatch.setattr(sensitivity.QuantizationProbe, "overlap", lambda *_args: 1.0)
    known = measure_sensitivity(model, ids, sums(1, 2, 256, 256))
    ones = torch.ones(256).numpy()
    for matrix in weight_rows(student):
        if matrix.bit_class == "expert_gate_up":
            for rows in matrix.rows:
                rows.copy_(torch.from_numpy(round_trip("IQ2_S", rows.numpy(), ones)))
    with torch.no_grad():
        expected = float(row_kl(model(ids).logits, student(ids).logits).mean())
    assert known.nats["expert_gate_up", 0]["IQ2_S"] == pytest.approx(expected, rel=1e-4) and expected > 0


def test_weights_that_lie_on_the_grid_of_a_fallback_lose_nothing_in_it():
    """Rows of 64: Q5_K becomes Q5_1, and what was stored so before is stored again unchanged; its neighbours cost more."""
    model, ids = tiny_model("qwen3_moe", layers=1), tiny_ids(16, 2)
    for matrix in weight_rows(model):
        if matrix.bit_class == "attention":
            assert type_for_row("Q5_K", matrix.rows.shape[-1]) == "Q5_1"
            matrix.rows.copy_(torch.from_numpy(round_trip("Q5_1", matrix.rows.numpy())))
    nats = measure_sensitivity(model, ids).nats["attention", 0]
    assert nats["Q5_K"] < 0.1 * nats["Q4_K"]
    smooth = measure_sensitivity(tiny_model("qwen3_moe", layers=1), ids).nats["attention", 0]
    assert nats["Q5_K"] < 0.1 * smooth["Q5_K"]


def test_rows_without_blocks_cost_nothing():
    known = measure_sensitivity(tiny_model("qwen3_moe", hidden=48, width=40, head_dim=12), tiny_ids())
    assert max(table["Q2_K"] for table in known.nats.values()) < 1e-4, "all is stored as float16"


def test_the_importance_is_the_profiles_and_only_where_it_fits():
    imatrix = {
        "expert_in": torch.ones(2, 4, 8, dtype=torch.float64),
        "expert_count": torch.full((2, 4), 100.0),
        "attention_in": torch.arange(48.0, dtype=torch.float64).reshape(6, 8),
        "dense_count": torch.tensor(10.0),
        "head_in": torch.ones(8, dtype=torch.float64),
    }
    experts = WeightRows("expert_gate_up", 5, 1, torch.zeros(4, 6, 8), "expert_in")
    assert tuple(importance_of(experts, imatrix).shape) == (4, 8)
    query = WeightRows("attention", 5, 1, torch.zeros(6, 8), "attention_in")
    assert importance_of(query, imatrix)[0].argmax() == 7 and tuple(importance_of(query, imatrix).shape) == (1, 8)
    assert tuple(
        importance_of(WeightRows("embedding_head", None, None, torch.zeros(9, 8), "head_in"), imatrix).shape
    ) == (1, 8)
    for nothing in (
        WeightRows("attention", 5, 1, torch.zeros(6, 4), "attention_in"),  # other columns
        WeightRows("attention", 5, 1, torch.zeros(6, 8), None),
    ):
        assert importance_of(nothing, imatrix) is None
    assert importance_of(query, None) is None


def test_codebooks_are_not_for_a_cpu_of_which_a_speed_is_demanded_nor_for_students_with_other_columns():
    speed = "target.budget.decode_tokens_per_s=5"
    assert codebooks_suit(config()) and codebooks_suit(config("plan.action=merge"))
    assert not codebooks_suit(config(speed)) and codebooks_suit(config(speed, "target.runtime.gpu_layers=-1"))
    assert not codebooks_suit(config("plan.action=dense")) and not codebooks_suit(config("plan.action=shared-core"))


def test_it_is_measured_on_the_first_rows_or_priors_decide():
    model, ids = tiny_model("qwen3_moe", layers=1), tiny_ids(tokens=12, rows=4)
    assert sensitivity_of(config("plan.sensitivity_tokens=24"), model, ids, None).tokens == 24
    assert sensitivity_of(config("plan.sensitivity_tokens=0"), model, ids, None) is None, "switched off"
    assert sensitivity_of(config(), None, ids, None) is None, "streamed"
