"""Evidence tokens: leave-one-out against the masked model, the null, the groups and the weights' sizes.

Shape suffixes: T tokens, K top-k, E experts, D model width, N rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_edge.formulas.cka import gram, normalise_rows
from moe_edge.formulas.cka_bootstrap import hsic_and_null, mean_cka
from moe_edge.models.pruning import masked
from moe_edge.models.views import MoELayerView, expert_outputs, moe_layers
from moe_edge.profiling.passes import run_pass, share_of
from moe_edge.profiling.sums import to_statistics
from moe_edge.storage.statistics import Statistics
from tests.tiny import ALL_FAMILIES, tiny_ids, tiny_model

ROWS, TOKENS = 3, 32
EVIDENCE = torch.arange(ROWS * TOKENS) % TOKENS > 0  # all but the first token of every row


def _profile(model: torch.nn.Module, tmp_path: Path, rows: int = ROWS, cka_tokens: int = 10**6) -> Statistics:
    work = share_of(tiny_ids(TOKENS, rows).int().numpy(), min(cka_tokens, rows * TOKENS))
    return to_statistics(run_pass(model, work, partial=tmp_path / "partial", identity={}), {})


def _block_inputs(model: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per MoE layer the block's input [1, T, D] and the chosen experts [T, K]."""
    found: list[dict[str, Any]] = [{} for _ in moe_layers(model)]
    handles = []
    for view, seen in zip(moe_layers(model), found, strict=True):
        handles.append(view.block.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.update(x=inputs[0])))
        handles.append(view.experts.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.update(i=inputs[1])))
    with torch.no_grad():
        model(input_ids=tiny_ids(TOKENS, ROWS))
    for handle in handles:
        handle.remove()
    return [(seen["x"].flatten(0, 1)[None], seen["i"]) for seen in found]


@contextmanager
def _without(model: torch.nn.Module, view: MoELayerView, expert: int) -> Iterator[None]:
    """The layer routes as if the expert were not there: masked, or, among groups of equal size, never selected."""
    if view.groups[0] == 1:
        with masked(model, {view.index: [other for other in range(view.count) if other != expert]}):
            yield
        return
    assert view.selection_bias is not None
    bias = view.selection_bias.tensor
    bias[..., expert] -= 100.0
    yield
    bias[..., expert] += 100.0


def _output(view: MoELayerView, hidden: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = view.block(hidden)
    return (output[0] if isinstance(output, tuple) else output).flatten(0, 1)


@pytest.mark.parametrize("family", [name for name in ALL_FAMILIES if name != "deepseek_v2"])
def test_leave_one_out_equals_the_masked_models_blocks(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, layers=3)
    found = _profile(model, tmp_path)
    for view, (hidden, index_TK) in zip(moe_layers(model), _block_inputs(model), strict=True):
        true_TD = _output(view, hidden)
        for expert in range(view.count):
            with _without(model, view, expert):
                without_TD = _output(view, hidden)
            chosen_T = (index_TK == expert).any(dim=1) & EVIDENCE
            error = (true_TD - without_TD)[chosen_T].double().square().sum()
            assert found.loo_counts_LE[view.position, expert] == chosen_T.sum()
            torch.testing.assert_close(found.loo_sq_sum_LE[view.position, expert], error, rtol=1e-4, atol=1e-6)


def test_groups_without_a_selection_bias_give_no_evidence(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v2", layers=3)
    found = _profile(model, tmp_path)
    assert moe_layers(model)[0].groups[0] > 1
    assert not found.loo_counts_LE.any() and not found.loo_sq_sum_LE.any()


def test_the_energy_is_that_of_the_routed_output(tmp_path: Path) -> None:
    model = tiny_model("mixtral")  # no shared expert: the block's output is the routed output
    found = _profile(model, tmp_path)
    for view, (hidden, _) in zip(moe_layers(model), _block_inputs(model), strict=True):
        energy = _output(view, hidden)[EVIDENCE].double().square().sum()
        torch.testing.assert_close(found.out_energy_L[view.position], energy, rtol=1e-5, atol=0.0)


def test_an_expert_with_a_copy_is_worth_nothing(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", top_k=1)
    with torch.no_grad():
        for view in moe_layers(model):
            for tensor in [found.tensor for found in view.expert_axes()]:
                tensor[3] = tensor[1]
    found = _profile(model, tmp_path)
    worth_LE = found.loo_sq_sum_LE / found.loo_counts_LE
    assert (worth_LE[:, 1] < 1e-9).all() and (worth_LE[:, [0, 2, 4, 5]] > 0.1).all()


def test_where_every_expert_is_chosen_none_can_be_replaced(tmp_path: Path) -> None:
    found = _profile(tiny_model("mixtral", experts=2, top_k=2), tmp_path)
    assert not found.loo_counts_LE.any() and not found.loo_sq_sum_LE.any() and (found.out_energy_L > 0).all()


def test_groups_add_up_and_the_null_is_the_formulas(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    found = _profile(model, tmp_path)
    assert found.hsic_groups_GLEE.shape[:2] == (ROWS, 2) and found.hsic_groups_GLEE.dtype == torch.float32
    torch.testing.assert_close(found.hsic_groups_GLEE.double().sum(0), found.hsic_LEE, rtol=1e-5, atol=1e-7)
    for view, (hidden, _) in zip(moe_layers(model), _block_inputs(model), strict=True):
        null = torch.zeros(view.count, view.count, dtype=torch.float64)
        for row in range(ROWS):
            tokens = torch.arange(1, TOKENS) + row * TOKENS
            null += hsic_and_null(gram(normalise_rows(expert_outputs(view, hidden[0, tokens]))), row)[1]
        torch.testing.assert_close(found.null_hsic_LEE[view.position], null, rtol=1e-4, atol=1e-6)


def test_the_null_of_similar_experts_is_near_zero(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():
        for view in moe_layers(model):
            for name in ("gate_up_proj", "down_proj"):
                stack = getattr(view.experts, name)
                stack.copy_(stack[:1] + 0.1 * stack)
    found = _profile(model, tmp_path, rows=16)
    for hsic_EE, null_EE in zip(found.hsic_LEE, found.null_hsic_LEE, strict=True):
        assert mean_cka(hsic_EE) > 0.9
        assert abs(mean_cka(null_EE, variance_E=hsic_EE.diagonal())) < 0.1


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_weight_sizes_are_over_gate_up_and_down(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    found = _profile(model, tmp_path, cka_tokens=0)
    for view in moe_layers(model):
        for expert in range(view.count):
            weights = (
                torch.cat([getattr(view.experts, n)[expert].flatten() for n in ("gate_up_proj", "down_proj")])
                .detach()
                .double()
            )
            assert float(found.weight_mean_abs_LE[view.position, expert]) == pytest.approx(
                float(weights.abs().mean()), rel=1e-6
            )
            assert float(found.weight_rms_LE[view.position, expert]) == pytest.approx(
                float(weights.square().mean().sqrt()), rel=1e-6
            )
