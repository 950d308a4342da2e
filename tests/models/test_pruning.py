"""Dropping experts: exact where it must be exact, refused where it is impossible, and for every family; masking neurons: the
same logits as a zero column, in every family's layout, and nothing left behind."""

from pathlib import Path

import pytest
import torch
from torch import nn

from moe_edge.contracts.errors import ConfigError, InputRejected
from moe_edge.models.loading import load_model, save_student
from moe_edge.models.pruning import check_kept, masked, masked_neurons, prune
from moe_edge.models.views import MoELayerView, expert_activations, expert_outputs, moe_layers
from moe_edge.models.weights import expert_width, read_expert, write_expert
from moe_edge.storage.files import read_json
from tests.tiny import ALL_FAMILIES, FAMILY_NAMES, tiny_checkpoint, tiny_ids, tiny_model

KEPT = {0: [0, 2, 3, 5], 1: [1, 2, 3, 4]}
IDS = tiny_ids()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_keeping_all_changes_no_bit(family: str) -> None:
    model = tiny_model(family)
    before, parameters = logits(model), dict(model.named_parameters())
    prune(model, {layer: list(range(6)) for layer in range(2)})
    assert torch.equal(logits(model), before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_masked_equals_pruned_and_leaves_no_trace(family: str, top_k: int | None) -> None:
    model = tiny_model(family)
    before = logits(model)
    with masked(model, KEPT, top_k):
        predicted = logits(model)
    assert torch.equal(logits(model), before)
    assert (predicted - before).abs().max() > 0.1
    prune(model, KEPT, top_k)
    assert torch.equal(logits(model), predicted)


def test_masking_ends_also_after_an_error() -> None:
    model = tiny_model("mixtral")
    before = logits(model)
    with pytest.raises(RuntimeError, match="stop"), masked(model, KEPT, 1):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), before)
    assert (model.num_experts, moe_layers(model)[0].top_k) == (6, 2)


def test_masked_copies_no_expert_and_allows_uneven_layers() -> None:
    model = tiny_model("qwen3_moe")
    stored = [parameter.data_ptr() for name, parameter in model.named_parameters() if ".experts." in name]
    with masked(model, {1: [0, 1, 2]}):
        inside = [parameter.data_ptr() for name, parameter in model.named_parameters() if ".experts." in name]
        changed = logits(model)
    assert inside == stored
    assert not torch.equal(changed, logits(model))


def test_observers_see_teacher_ids_while_masked() -> None:
    model = tiny_model("qwen2_moe")
    seen: set[int] = set()
    view = moe_layers(model)[0]
    hook = view.experts.register_forward_pre_hook(lambda _module, inputs: seen.update(inputs[1].flatten().tolist()))
    with masked(model, KEPT):
        logits(model)
    hook.remove()
    assert seen == set(KEPT[0])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_pruned_tensors_are_the_kept_rows(family: str) -> None:
    model, teacher = tiny_model(family), tiny_model(family)
    prune(model, KEPT, 3)
    for view, old in zip(moe_layers(model), moe_layers(teacher), strict=True):
        ids = KEPT[view.index]
        assert torch.equal(view.router.weight, old.router.weight[ids])
        assert torch.equal(view.experts.gate_up_proj, old.experts.gate_up_proj[ids])
        assert torch.equal(view.experts.down_proj, old.experts.down_proj[ids])
        assert view.experts.num_experts == view.router.num_experts == view.count == 4
        assert view.router.top_k == getattr(view.block, "top_k", 3) == 3
    assert (model.num_experts, model.num_experts_per_tok) == (4, 3)
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (4, 3)
    untouched = {name: p for name, p in model.named_parameters() if ".experts." not in name and ".gate." not in name}
    assert all(torch.equal(p, teacher.get_parameter(name)) for name, p in untouched.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_prune_save_reload_differs_by_nothing(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    teacher = tiny_checkpoint(tmp_path, family, dtype=dtype)
    model = load_model(teacher, dtype=dtype)
    prune(model, KEPT, 1)
    save_student(model, teacher, tmp_path / "student")
    again = load_model(tmp_path / "student", dtype=dtype)
    assert (logits(again).float() - logits(model).float()).abs().max() == 0.0
    config = read_json(tmp_path / "student" / "config.json")
    assert (config["num_experts"], config["num_local_experts"], config["num_experts_per_tok"]) == (4, 4, 1)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_permuting_experts_with_their_router_rows_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    order = [3, 0, 5, 1, 4, 2]
    with torch.no_grad():
        for view in moe_layers(model):
            for parameter in (view.experts.gate_up_proj, view.experts.down_proj, view.router.weight):
                parameter.copy_(parameter[order].clone())
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_one_training_step_has_finite_gradients(family: str) -> None:
    model = tiny_model(family)
    prune(model, KEPT)
    model.train()
    out = model(IDS, labels=IDS, output_router_logits=True)
    assert torch.isfinite(out.aux_loss) and out.router_logits[0].shape[-1] == 4
    out.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
    routers = [g for name, g in gradients.items() if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2 and all(g.abs().max() > 0 for g in routers)


def test_the_balance_loss_also_works_while_masked() -> None:
    model = tiny_model("olmoe")
    with masked(model, KEPT, 1), torch.no_grad():
        predicted = model(IDS, output_router_logits=True).aux_loss
    prune(model, KEPT, 1)
    with torch.no_grad():
        assert model(IDS, output_router_logits=True).aux_loss == predicted


def test_frozen_parameters_stay_frozen() -> None:
    model = tiny_model("mixtral").requires_grad_(False)
    prune(model, KEPT)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kept", "top_k", "word"),
    [
        ({0: [0, 1], 1: [0, 1]}, 3, "top-k 3 exceeds the kept experts"),
        ({0: [0], 1: [0]}, None, "top-k 2 exceeds"),
        (KEPT, 0, "top-k 0"),
        ({0: [0, 1, 2]}, None, "same number of experts"),
        ({0: [2, 1, 0], 1: [0, 1, 2]}, None, "ascending"),
        ({0: [0, 0, 1], 1: [0, 1, 2]}, None, "ascending"),
        ({0: [0, 1, 6], 1: [0, 1, 2]}, None, r"0\.\.5"),
        ({0: [-1, 0, 1], 1: [0, 1, 2]}, None, "ascending"),
        ({0: [], 1: []}, None, "ascending"),
        ({7: [0, 1, 2]}, None, "no MoE layer 7"),
    ],
)
def test_impossible_choices_are_refused_before_any_change(
    kept: dict[int, list[int]], top_k: int | None, word: str
) -> None:
    model = tiny_model("qwen3_moe")
    before = logits(model)
    with pytest.raises(ConfigError, match=word) as caught:
        prune(model, kept, top_k)
    assert caught.value.exit_code == 2
    assert torch.equal(logits(model), before) and model.config.num_experts == 6


def test_masking_refuses_too_large_top_k() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(ConfigError, match="top-k 5"), masked(model, KEPT, 5):
        raise AssertionError("not reached")
    check_kept(model, {0: [0, 1]}, uniform=False)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_expert_outputs_add_up_to_the_block(family: str) -> None:
    model = tiny_model(family)
    view = moe_layers(model)[1]
    caught: dict[str, tuple[torch.Tensor, ...]] = {}
    hooks = [
        view.experts.register_forward_pre_hook(lambda _m, inputs: caught.update(inputs=inputs)),
        view.experts.register_forward_hook(lambda _m, _i, out: caught.update(output=(out,))),
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    hidden_TD, index_TK, weight_TK = caught["inputs"]
    outputs_ETD = expert_outputs(view, hidden_TD)
    assert outputs_ETD.shape == (6, hidden_TD.shape[0], 64)
    weight_TE = torch.zeros(hidden_TD.shape[0], 6).scatter(1, index_TK, weight_TK.detach())
    expected_TD = torch.einsum("etd,te->td", outputs_ETD, weight_TE)
    torch.testing.assert_close(caught["output"][0].detach(), expected_TD, rtol=1e-5, atol=1e-5)
    assert torch.equal(expert_outputs(view, hidden_TD, [4, 1]), outputs_ETD[[4, 1]])
    activation_TF = expert_activations(view, hidden_TD, 3)
    assert activation_TF.shape[1] == 32
    torch.testing.assert_close(activation_TF @ view.experts.down_proj[3].T, outputs_ETD[3], rtol=1e-5, atol=1e-5)
    assert (view.shared is not None) == (family == "qwen2_moe")


def test_dense_layers_are_skipped() -> None:
    model = tiny_model("qwen3_moe", mlp_only_layers=[0], layers=3)
    assert [(view.index, view.position) for view in moe_layers(model)] == [(1, 0), (2, 1)]
    with pytest.raises(ConfigError, match="no MoE layer 0"):
        prune(model, {0: [0, 1]})


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(InputRejected, match="none of the 2 layers has experts"):
        moe_layers(tiny_model("qwen3_moe", mlp_only_layers=[0, 1]))


def random_mask(view: MoELayerView) -> torch.Tensor:
    generator = torch.Generator().manual_seed(view.index)
    return torch.rand(view.count, expert_width(view), generator=generator) < 0.5


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_masked_neuron_is_a_zero_column(family: str) -> None:
    model = tiny_model(family, layers=3)
    whole = logits(model)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    with masked_neurons(model, random_mask):
        found = logits(model)
    torch.testing.assert_close(logits(model), whole, atol=0, rtol=0)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert (found - whole).abs().max() > 1e-3
    for view in moe_layers(model):
        mask_EF = random_mask(view)
        for expert in range(view.count):
            weights = read_expert(view, expert)
            write_expert(view, expert, weights._replace(down_DF=weights.down_DF * mask_EF[expert]))
    torch.testing.assert_close(found, logits(model), atol=1e-6, rtol=1e-6)


def test_masked_neurons_compose_with_masked_experts_and_an_error_leaves_the_model_as_it_was() -> None:
    model = tiny_model("qwen3_moe")
    kept, whole = {0: [0, 2, 5], 1: [1, 2, 3]}, logits(model)
    with masked(model, kept), masked_neurons(model, lambda view: torch.ones(view.count, expert_width(view)).bool()):
        all_neurons = logits(model)
    with masked(model, kept):
        torch.testing.assert_close(logits(model), all_neurons, atol=0, rtol=0)
    handle = moe_layers(model)[0].experts.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), masked_neurons(model, random_mask):
        logits(model)
    handle.remove()
    torch.testing.assert_close(logits(model), whole, atol=0, rtol=0)
