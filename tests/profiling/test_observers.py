"""The observers leave the model's results alone and count what a slow, separate computation counts.

Shape suffixes: T tokens, K top-k, E experts, D model width, N rows, S tokens of a row.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_edge.formulas.cka import cka_from_hsic, hsic_all_pairs, normalise_rows
from moe_edge.models.taps import head
from moe_edge.models.views import expert_activations, expert_outputs, moe_layers
from moe_edge.profiling.evidence import Block
from moe_edge.profiling.passes import new_sums, observing_all, run_pass, share_of
from moe_edge.profiling.sums import to_statistics
from moe_edge.storage.statistics import Statistics
from tests.tiny import ALL_FAMILIES, tiny_ids, tiny_model

ROWS, TOKENS = 3, 32


def _calls(model: torch.nn.Module, ids_NS: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Per layer what experts and router really saw and said, and the residual stream behind the layer."""
    calls: list[dict[str, Any]] = [{} for _ in moe_layers(model)]
    handles = []
    for view, call in zip(moe_layers(model), calls, strict=True):

        def on_experts(module: Any, inputs: Any, call: dict[str, Any] = call) -> None:
            call.update(hidden=inputs[0], index=inputs[1], weight=inputs[2])

        def on_router(module: Any, inputs: Any, output: Any, call: dict[str, Any] = call) -> None:
            call.update(logits=output[0])

        def on_layer(module: Any, inputs: Any, output: Any, call: dict[str, Any] = call) -> None:
            call.update(residual=output.flatten(0, 1))

        handles.append(view.experts.register_forward_pre_hook(on_experts))
        handles.append(view.router.register_forward_hook(on_router))
        handles.append(view.layer.register_forward_hook(on_layer))
    with torch.no_grad():
        model(input_ids=ids_NS)
    for handle in handles:
        handle.remove()
    return calls


def _profile(model: torch.nn.Module, ids_NS: torch.Tensor, tmp_path: Path, cka_tokens: int = 0) -> Statistics:
    work = share_of(ids_NS.int().numpy(), cka_tokens)
    sums = run_pass(model, work, partial=tmp_path / "partial", identity={})
    return to_statistics(sums, {})


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_observing_does_not_change_the_logits(family: str) -> None:
    model, ids = tiny_model(family, layers=3), tiny_ids(TOKENS, ROWS)
    positions = torch.arange(8, 24)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with observing_all(model, new_sums(model, 1, "cpu")) as batch:
            batch.blocks = [Block(positions + TOKENS, positions)]
            observed = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    torch.testing.assert_close(observed, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(again, plain)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("cka_tokens", [0, 48])
def test_sums_equal_a_separate_computation(family: str, cka_tokens: int, tmp_path: Path) -> None:
    model, ids = tiny_model(family, layers=3), tiny_ids(TOKENS, ROWS)
    found = _profile(model, ids, tmp_path, cka_tokens)
    assert found.meta["moe_layers"] == [view.index for view in moe_layers(model)]
    assert found.tokens == ROWS * TOKENS
    for layer, (view, call) in enumerate(zip(moe_layers(model), _calls(model, ids), strict=True)):
        outputs_ETD = expert_outputs(view, call["hidden"]).double()
        for expert in range(view.count):
            token, slot = (call["index"] == expert).nonzero(as_tuple=True)
            f, g = outputs_ETD[expert, token], call["weight"][token, slot].double()
            norm = f.norm(dim=-1)
            active = expert_activations(view, call["hidden"][token], expert)
            expected = {
                "counts_LE": len(token), "gate_sum_LE": g.sum(), "norm_sum_LE": norm.sum(),
                "norm_sq_sum_LE": norm.square().sum(), "gated_norm_sum_LE": (g * norm).sum(),
                "norm_max_LE": norm.max() if len(token) else 0, "out_sum_LED": f.sum(0),
                "out_sq_sum_LED": f.square().sum(0),
            }  # fmt: skip
            for name, value in expected.items():
                actual = getattr(found, name)[layer, expert].double()
                torch.testing.assert_close(actual, torch.as_tensor(value, dtype=torch.float64), rtol=1e-5, atol=1e-4)
            for name, value in (("expert_in", call["hidden"][token]), ("expert_down", active)):
                actual = found.imatrix[name][layer, expert]
                torch.testing.assert_close(actual, value.double().square().sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.imatrix["expert_count"], found.counts_LE.double())


def test_routing_sums(tmp_path: Path) -> None:
    model, ids = tiny_model("olmoe"), tiny_ids(TOKENS, ROWS)
    found = _profile(model, ids, tmp_path)
    for layer, call in enumerate(_calls(model, ids)):
        chosen = torch.zeros(ROWS * TOKENS, 6).scatter_(1, call["index"], 1.0)
        assert torch.equal(found.coroute_LEE[layer], (chosen.T @ chosen).long())
        assert torch.equal(found.coroute_LEE[layer].diagonal(), found.counts_LE[layer])
        entropy = torch.distributions.Categorical(logits=call["logits"]).entropy().mean()
        assert found.router_entropy_L[layer] == pytest.approx(float(entropy), rel=1e-5)
        assert found.gate_mass_L[layer] == pytest.approx(float(call["weight"].sum(-1).mean()), rel=1e-5)


def test_dense_imatrix_sums(tmp_path: Path) -> None:
    model, ids = tiny_model("qwen2_moe"), tiny_ids(TOKENS, ROWS)
    found = _profile(model, ids, tmp_path).imatrix
    seen: dict[str, torch.Tensor] = {}
    layer = model.model.layers[1]
    modules = {
        "attention_in": layer.self_attn.k_proj, "attention_o": layer.self_attn.o_proj,
        "shared_down": layer.mlp.shared_expert.down_proj, "ffn_in": layer.mlp.shared_expert.up_proj,
        "head_in": head(model),
    }  # fmt: skip
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0]))
    with torch.no_grad():
        model(input_ids=ids)
    for name, inputs in seen.items():
        actual = found[name] if name == "head_in" else found[name][1]
        torch.testing.assert_close(actual, inputs.flatten(0, -2).double().square().sum(0), rtol=1e-5, atol=1e-5)
    assert found["dense_count"] == ROWS * TOKENS


def test_cka_sums_equal_the_formula_on_the_same_tokens(tmp_path: Path) -> None:
    model, ids = tiny_model("qwen3_moe"), tiny_ids(TOKENS, ROWS)
    found = _profile(model, ids, tmp_path, cka_tokens=ROWS * TOKENS)  # a block per row
    calls = _calls(model, ids)
    keep = torch.arange(TOKENS) > 0
    layer_hsic = torch.zeros(2, 2, dtype=torch.float64)
    for row in range(ROWS):
        tokens = torch.arange(TOKENS)[keep] + row * TOKENS
        layer_hsic += hsic_all_pairs(torch.stack([normalise_rows(call["residual"][tokens]) for call in calls]))
    torch.testing.assert_close(found.layer_hsic_LL, layer_hsic, rtol=1e-4, atol=1e-6)
    for layer, (view, call) in enumerate(zip(moe_layers(model), calls, strict=True)):
        plain, gated = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
        for row in range(ROWS):
            tokens = torch.arange(TOKENS)[keep] + row * TOKENS
            features = normalise_rows(expert_outputs(view, call["hidden"][tokens]))
            gates = call["logits"][tokens].softmax(-1).T
            plain += hsic_all_pairs(features)
            gated += hsic_all_pairs(features * gates.unsqueeze(-1))
        torch.testing.assert_close(found.hsic_LEE[layer], plain, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.gated_hsic_LEE[layer], gated, rtol=1e-4, atol=1e-8)
    assert found.sink_share_L.tolist() == [1 / TOKENS] * 2
    assert found.cka_tokens == ROWS * TOKENS


def test_a_copied_expert_has_cka_one_and_a_dead_one_no_evidence(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():
        for view in moe_layers(model):
            view.experts.gate_up_proj[3] = view.experts.gate_up_proj[1]
            view.experts.down_proj[3] = 0.5 * view.experts.down_proj[1]
            view.experts.down_proj[5] = 0.0
    found = _profile(model, tiny_ids(TOKENS, ROWS), tmp_path, cka_tokens=ROWS * TOKENS)
    cka = cka_from_hsic(found.hsic_LEE)
    torch.testing.assert_close(cka[:, 1, 3], torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-4)
    assert cka[:, 5].isnan().all()
    assert (cka[:, 0, 1].abs() < 0.5).all()


def test_massive_tokens_are_dropped_and_counted(tmp_path: Path) -> None:
    model, ids = tiny_model("qwen3_moe"), tiny_ids(TOKENS, ROWS)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] *= 500
    ids[:] = torch.where(ids == 7, 8, ids)
    ids[1, 20] = 7
    found = _profile(model, ids, tmp_path, cka_tokens=ROWS * TOKENS)
    assert found.sink_share_L.tolist() == pytest.approx([(ROWS + 1) / (ROWS * TOKENS)] * 2)


def test_bfloat16_teachers_are_profiled(tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe").bfloat16()
    found = _profile(model, tiny_ids(TOKENS, ROWS), tmp_path, cka_tokens=64)
    assert found.counts_LE.sum() == 2 * 2 * ROWS * TOKENS
    assert all(np.isfinite(tensor).all() for tensor in found.imatrix.values())
