"""Every family on a tiny random model: dropping, masking, permuting and running experts, saving, reloading, one training
step. The tiny models have dense first layers, groups, biases and shared experts wherever their family has them.

Legend: E experts, K top-k, T tokens, D model.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.contracts.spec import MoESpec, keepable_counts
from moe_edge.families import family_of
from moe_edge.models.loading import load_model, save_student, stored_dtype
from moe_edge.models.pruning import check_kept, masked, prune
from moe_edge.models.taps import body, decoder_layers, dense_taps, head
from moe_edge.models.views import MoELayerView, expert_outputs, moe_layers, route, router_scores, shared_matrices
from moe_edge.models.weight_sources import assemble
from moe_edge.models.weights import read_expert
from moe_edge.storage.checkpoint import TensorReader, inspect_checkpoint
from tests.families.helpers import EXPERTS, IDS, KEPT, LAYERS, kept_everywhere, logits, seen_by_experts
from tests.tiny import ALL_FAMILIES, tiny_checkpoint


@pytest.fixture(scope="module", params=ALL_FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each family in turn."""
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param, experts=EXPERTS, layers=LAYERS)


def test_keeping_all_changes_no_bit(folder: Path) -> None:
    model = load_model(folder)
    before, tensors = logits(model), dict(model.state_dict(keep_vars=True))
    prune(model, kept_everywhere(model, list(range(EXPERTS))))
    assert torch.equal(logits(model), before)
    assert all(tensor is tensors[name] for name, tensor in model.state_dict(keep_vars=True).items())


@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_masked_equals_pruned_and_leaves_no_trace(folder: Path, top_k: int | None) -> None:
    model = load_model(folder)
    kept, before = kept_everywhere(model), logits(model)
    if top_k is not None and moe_layers(model)[0].family.fixed_top_k:
        with pytest.raises(ConfigError, match="computes top-k 2 only"), masked(model, kept, top_k):
            raise AssertionError("not reached")
        return
    with masked(model, kept, top_k):
        predicted = logits(model)
    assert torch.equal(logits(model), before)
    assert (predicted - before).abs().max() > 0.1
    prune(model, kept, top_k)
    assert torch.equal(logits(model), predicted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prune_save_reload_differs_by_nothing(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    load_model(folder, dtype).save_pretrained(tmp_path)
    headers = inspect_checkpoint(tmp_path, require_tokenizer=False)
    assert stored_dtype(headers) == dtype
    model = load_model(tmp_path, dtype)
    top_k = None if moe_layers(model)[0].family.fixed_top_k else 1
    prune(model, kept_everywhere(model), top_k)
    save_student(model, folder, tmp_path / "student")
    again = load_model(tmp_path / "student", dtype)
    assert (logits(again) - logits(model)).abs().max() == 0.0
    student = inspect_checkpoint(tmp_path / "student")
    spec = family_of(student.config).spec(student.config)
    assert (spec.moe.experts, spec.moe.top_k) == (6, top_k or 2)
    assert stored_dtype(student) == dtype
    assert {"tokenizer.json", "chat_template.jinja"} <= {path.name for path in (tmp_path / "student").iterdir()}


def test_a_student_holds_the_kept_slices_and_everything_else_unchanged(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    prune(model, kept_everywhere(model))
    save_student(model, folder, tmp_path)
    old, new = TensorReader(folder), TensorReader(tmp_path)
    family = family_of(old.headers.config)
    entries = [family.tensors(reader.headers.config, reader.headers.tensors) for reader in (old, new)]
    dropped = 0
    for before, after in zip(*entries, strict=True):
        expected = assemble(before, old)
        if before.shape != after.shape:
            expected, dropped = expected[KEPT], dropped + 1
        assert torch.equal(assemble(after, new), expected), (before.tensor_class, before.part)
    views = moe_layers(model)
    of_experts = 6 if views[0].experts.has_bias else 3  # gate, up, down
    assert dropped == len(views) * (len(list(views[0].router_axes())) + of_experts)


def test_counters_and_config_follow(folder: Path) -> None:
    model = load_model(folder)
    family = moe_layers(model)[0].family
    prune(model, kept_everywhere(model), None if family.fixed_top_k else 3)
    for view in moe_layers(model):
        assert view.count == 6 and view.top_k == (family.fixed_top_k or 3)
        assert all(axis.tensor.shape[axis.axis] == 6 for axis in view.expert_axes())
        modules = (view.router, view.block, view.experts, view.router_weight.owner)
        assert {getattr(module, name, 6) for module in modules for name in ("num_experts", "out_features")} == {6}
    assert {getattr(model.config, key, 6) for key in family.expert_keys} == {6}
    assert family.spec(model.config.to_dict()).moe.top_k == (family.fixed_top_k or 3)
    assert getattr(model, "num_experts", 6) == 6


def test_permuting_experts_with_all_their_tensors_changes_nothing(folder: Path) -> None:
    model = load_model(folder)
    before = logits(model)
    order = [6, 4, 7, 5, 2, 0, 3, 1]  # swaps the halves, so that groups stay together
    with torch.no_grad():
        for view in moe_layers(model):
            for axis in view.expert_axes():
                axis.tensor.copy_(axis.tensor.index_select(axis.axis, torch.tensor(order)))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=5e-5)


def test_every_expert_sized_tensor_matters(folder: Path) -> None:
    """Otherwise the test above could leave one out."""
    model = load_model(folder)
    before = logits(model)
    for axis in moe_layers(model)[-1].expert_axes():
        values = axis.tensor.detach().clone()
        with torch.no_grad():
            axis.tensor.copy_(values.roll(1, axis.axis))
            assert (logits(model) - before).abs().max() > 1e-3, axis.name
            axis.tensor.copy_(values)
    named = {id(axis.tensor) for view in moe_layers(model) for axis in view.expert_axes()}
    inside = [view.block.state_dict(keep_vars=True) for view in moe_layers(model)]
    missed = [name for tensors in inside for name, t in tensors.items() if EXPERTS in t.shape and id(t) not in named]
    assert not missed


def test_one_training_step_has_finite_gradients(folder: Path) -> None:
    model = load_model(folder)
    prune(model, kept_everywhere(model))
    model.train()
    torch.manual_seed(0)  # phimoe draws its experts
    extra = {"output_router_logits": True} if hasattr(model, "num_experts") else {}
    loss = model(IDS, labels=IDS, **extra).loss
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if not name.endswith("e_score_correction_bias")}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained.values())
    assert all(view.router_weight.tensor.grad.abs().max() > 0 for view in moe_layers(model))
    torch.optim.SGD(trained.values(), lr=0.05).step()
    assert model.eval()(IDS, labels=IDS).loss < loss


def test_frozen_parameters_stay_frozen(folder: Path) -> None:
    model = load_model(folder).requires_grad_(False)
    prune(model, kept_everywhere(model))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_routed_expert_outputs_add_up_to_the_block(folder: Path) -> None:
    model = load_model(folder)
    view = moe_layers(model)[-1]
    hidden_TD, index_TK, weight_TK, output_TD = seen_by_experts(model, view)
    ours = route(view, hidden_TD)
    assert torch.equal(ours[0], index_TK) and torch.equal(ours[1], weight_TK)
    outputs_ETD = expert_outputs(view, hidden_TD)
    weight_TE = torch.zeros(len(hidden_TD), EXPERTS).scatter(1, index_TK, weight_TK.float())
    expected_TD = torch.einsum("etd,te->td", outputs_ETD, weight_TE)
    torch.testing.assert_close(output_TD, expected_TD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expert_outputs(view, hidden_TD, [4, 1]), outputs_ETD[[4, 1]])


def test_the_spec_says_how_tokens_are_routed(folder: Path) -> None:
    """The block's routing against a float64 reference that knows nothing but the spec and the tensors."""
    model = load_model(folder)
    view = moe_layers(model)[0]
    moe = view.family.spec(model.config.to_dict()).moe
    hidden_TD, index_TK, weight_TK, _ = seen_by_experts(model, view)
    scores_TE = reference_scores(moe, view, hidden_TD)
    torch.testing.assert_close(router_scores(view, hidden_TD), scores_TE.float(), rtol=1e-5, atol=1e-6)
    if moe.gating == "sparsemixer":
        return  # approximated nowhere: what it does is the router's own business
    chosen_TK = reference_choice(moe, view, scores_TE)
    weights_TK = scores_TE.gather(1, chosen_TK)
    if moe.renormalise:
        weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
    expected_TE = torch.zeros_like(scores_TE).scatter(1, chosen_TK, weights_TK * moe.routed_scale)
    actual_TE = torch.zeros_like(scores_TE).scatter(1, index_TK, weight_TK.double())
    torch.testing.assert_close(actual_TE, expected_TE, rtol=1e-5, atol=1e-5)


def reference_scores(moe: MoESpec, view: MoELayerView, hidden_TD: Tensor) -> Tensor:
    logits_TE = hidden_TD.double() @ view.router_weight.tensor.detach().double().T
    if moe.router_bias:
        logits_TE += view.router.bias.detach().double()
    return logits_TE.sigmoid() if moe.gating == "sigmoid" else logits_TE.softmax(dim=1)


def reference_choice(moe: MoESpec, view: MoELayerView, scores_TE: Tensor) -> Tensor:
    """Ids of the chosen experts, (T, K)."""
    judged_TE = scores_TE.clone()
    assert moe.selection_bias == (view.selection_bias is not None)
    if view.selection_bias is not None:
        judged_TE += view.selection_bias.tensor.detach().double().flatten()
    size = moe.experts // moe.groups
    for row_E in judged_TE:
        best = [row_E[g * size : (g + 1) * size].topk(moe.fewest_per_group).values.sum() for g in range(moe.groups)]
        for group in sorted(range(moe.groups), key=lambda g: best[g])[: moe.groups - moe.groups_used]:
            row_E[group * size : (group + 1) * size] = -torch.inf
    return judged_TE.topk(moe.top_k, dim=1).indices


def test_the_spec_says_how_an_expert_works(folder: Path) -> None:
    model = load_model(folder)
    view = moe_layers(model)[0]
    moe = view.family.spec(model.config.to_dict()).moe
    weights = read_expert(view, 5)
    assert (weights.down_bias_D is not None) == moe.expert_biases
    hidden_TD = torch.randn(7, model.config.hidden_size, generator=torch.manual_seed(0))
    gate_TF = nn.functional.linear(hidden_TD, weights.gate_FD, weights.gate_bias_F)
    up_TF = nn.functional.linear(hidden_TD, weights.up_FD, weights.up_bias_F)
    if moe.activation == "clamped_swiglu":
        gate_TF, up_TF = gate_TF.clamp(max=moe.swiglu_limit), up_TF.clamp(-moe.swiglu_limit, moe.swiglu_limit) + 1
    active_TF = gate_TF * torch.sigmoid(moe.swiglu_alpha * gate_TF) * up_TF
    expected_TD = nn.functional.linear(active_TF, weights.down_DF, weights.down_bias_D)
    torch.testing.assert_close(expert_outputs(view, hidden_TD, [5])[0], expected_TD, rtol=1e-5, atol=1e-5)


def test_the_shared_expert_is_its_three_matrices(folder: Path) -> None:
    for view in moe_layers(load_model(folder)):
        if view.shared is None:
            continue
        gate_FD, up_FD, down_DF = shared_matrices(view)
        hidden_TD = torch.randn(7, gate_FD.shape[1], generator=torch.manual_seed(0))
        active_TF = nn.functional.silu(hidden_TD @ gate_FD.T) * (hidden_TD @ up_FD.T)
        torch.testing.assert_close(view.shared(hidden_TD), active_TF @ down_DF.T, rtol=1e-5, atol=1e-5)


def test_layers_with_experts_are_those_of_the_spec(folder: Path) -> None:
    model = load_model(folder)
    views = moe_layers(model)
    spec = views[0].family.spec(model.config.to_dict())
    assert tuple(view.index for view in views) == spec.moe_layers
    assert [view.position for view in views] == list(range(len(views)))
    assert {view.count for view in views} == {EXPERTS}
    assert {view.groups for view in views} == {(spec.moe.groups, spec.moe.groups_used)}
    assert all((view.shared is not None) == bool(spec.moe.shared_width) for view in views)


def test_keepable_counts_are_those_that_can_be_kept(folder: Path) -> None:
    model = load_model(folder)
    spec = moe_layers(model)[0].family.spec(model.config.to_dict())
    groups, size = spec.moe.groups, EXPERTS // spec.moe.groups
    for top_k in (1, 2, 3) if not moe_layers(model)[0].family.fixed_top_k else (2,):
        possible = []
        for count in range(groups, EXPERTS + 1, groups):
            ids = [group * size + place for group in range(groups) for place in range(count // groups)]
            try:
                check_kept(model, kept_everywhere(model, ids), top_k)
            except ConfigError:
                continue
            possible.append(count)
        assert possible == keepable_counts(spec, top_k), top_k


def test_taps_hear_the_inputs_of_every_dense_product(folder: Path) -> None:
    model = load_model(folder)
    layers, views = decoder_layers(model), {view.index: view for view in moe_layers(model)}
    widths: dict[str, set[int]] = {}
    for tap in dense_taps(model):
        widths.setdefault(tap.name, set()).add(tap.module.in_features)
        assert any(tap.module is module for module in layers[tap.layer].modules())
    assert all(len(found) == 1 for found in widths.values())
    for index, layer in enumerate(layers):
        names = [tap.name for tap in dense_taps(model) if tap.layer == index]
        assert len(set(names)) == len(names) and "attention_in" in names
        assert ("dense_down" in names) == (index not in views)
        assert ("shared_down" in names) == (index in views and views[index].shared is not None)
        tapped = {tap.module.in_features for tap in dense_taps(model) if tap.layer == index}
        assert {module.in_features for module in layer.modules() if isinstance(module, nn.Linear)} <= tapped | {64}


def test_the_head_gives_the_logits(folder: Path) -> None:
    model = load_model(folder)
    with torch.no_grad():
        hidden_TD = body(model)(IDS).last_hidden_state.flatten(0, 1)
        expected = logits(model).flatten(0, 1)
        torch.testing.assert_close(head(model)(hidden_TD), expected)
        if getattr(model.config, "lm_head_bias", False):
            with pytest.raises(InputRejected, match="head with a bias"):
                _ = head(model).weight
        else:
            torch.testing.assert_close(hidden_TD @ head(model).weight.T, expected, rtol=1e-5, atol=1e-5)
