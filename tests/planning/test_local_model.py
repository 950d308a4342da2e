"""The local model of a choice: gradients against differences of the KL, likeness against the model itself."""

import pytest
import torch

from moe_edge.formulas.divergence import kl_dense
from moe_edge.formulas.swaps import predict
from moe_edge.models.pruning import masked
from moe_edge.models.taps import decoder_layers, recorded_outputs
from moe_edge.models.views import expert_outputs, moe_layers
from moe_edge.planning.local_model import local_layers
from moe_edge.planning.partial_runs import Meter
from tests.tiny import tiny_ids, tiny_model

KEPT = {0: [0, 1, 3, 5], 1: [1, 2, 4, 5]}
OTHER = [0, 2, 3, 5]  # of layer 0


def look(model, ids, top_k=None, residual_scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return local_layers(
        model, KEPT, ids, top_k=top_k, residual_scale=residual_scale, generator=generator, meter=Meter(model)
    )


def kl_sum(model, ids, kept, added=None):
    """Sum over tokens of the KL under `kept`, with a tensor added to what the experts of layer 0 return."""
    with torch.no_grad():
        teacher = model(ids).logits[0].double()
        handle = None
        if added is not None:
            experts = moe_layers(model)[0].experts
            handle = experts.register_forward_hook(lambda _module, _inputs, output: output + added)
        with masked(model, kept):
            student = model(ids).logits[0].double()
        if handle is not None:
            handle.remove()
    return float(kl_dense(teacher, student).sum())


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_the_pull_is_the_slope_of_the_kl(family):
    model, ids = tiny_model(family).double(), tiny_ids(rows=1)
    model.set_experts_implementation("eager")  # the others have no float64
    layer = look(model, ids)[0]
    expert_D = expert_outputs(layer.view, layer.hidden_TD)[2, 7]
    step = 0.01  # norms work in float32
    added = torch.zeros(ids.shape[1], 64, dtype=torch.float64)
    added[7] = step * expert_D
    slope = (kl_sum(model, ids, KEPT, added) - kl_sum(model, ids, KEPT, -added)) / (2 * step)
    assert float(layer.products.pull_RTE[0, 7, 2]) == pytest.approx(slope, rel=0.01)


def test_a_drawn_label_gives_a_score_whose_square_is_the_curvature():
    """Over many draws the mean square of the score equals the second difference of KL(q || q moved), at the last token,
    whose change reaches no other."""
    model, ids = tiny_model("qwen3_moe", vocab=16).double(), tiny_ids(rows=1, vocab=16)
    model.set_experts_implementation("eager")
    many = ids.repeat(100, 1)
    layer = look(model, many)[1]
    last = torch.arange(ids.shape[1] - 1, len(layer.hidden_TD), ids.shape[1])
    measured = float(layer.products.pull_RTE[1, last, 1].square().mean())
    moved_D = expert_outputs(layer.view, layer.hidden_TD[last[:1]])[1, 0]
    step, logits = 1e-3, []
    for sign in (0, 1, -1):
        handle = layer.view.experts.register_forward_hook(
            lambda _m, _i, output, sign=sign: output.index_add(
                0, torch.tensor([len(output) - 1]), sign * step * moved_D[None]
            )
        )
        with torch.no_grad(), masked(model, KEPT):
            logits.append(model(ids).logits[0, -1].double())
        handle.remove()
    ahead, behind = (float(kl_dense(logits[0][None], moved[None])) for moved in logits[1:])
    assert measured == pytest.approx((ahead + behind) / step**2, rel=0.25)


def test_the_predicted_likeness_is_the_models_own():
    """In the layer that changes nothing is approximated: the cosine is that of a real run."""
    model, ids = tiny_model("qwen2_moe"), tiny_ids(rows=2)
    local = look(model, ids)[0]
    found = local.predict([KEPT[0], OTHER], None)

    def stream(kept):
        outputs = {}
        with torch.no_grad(), masked(model, kept), recorded_outputs(decoder_layers(model), outputs):
            model(ids)
        return outputs[0].flatten(0, 1)

    teacher = stream({})
    before, after = (
        torch.cosine_similarity(stream(KEPT | {0: kept}), teacher, dim=-1).mean() for kept in (KEPT[0], OTHER)
    )
    assert float(found.likeness[0]) == pytest.approx(0, abs=1e-6) and float(found.gain[0]) == pytest.approx(0, abs=1e-6)
    assert float(found.likeness[1]) == pytest.approx(float(after - before), abs=1e-5)


def test_the_weights_are_those_of_the_masked_model():
    model, ids = tiny_model("olmoe"), tiny_ids(rows=1)
    local = look(model, ids, top_k=1)[1]
    assert local.products.weight_TE.shape == (ids.shape[1], 6)
    assert ((local.products.weight_TE > 0).sum(dim=1) == 1).all(), "top-1, as asked for"
    assert (local.products.weight_TE[:, [0, 3]] == 0).all(), "dropped experts have no weight"
    assert float(local.predict([KEPT[1]], 1).gain[0]) == pytest.approx(0, abs=1e-7)


def test_the_model_is_left_as_it_was():
    model, ids = tiny_model("qwen3_moe"), tiny_ids(rows=1)
    model.requires_grad_(True)
    model.lm_head.weight.requires_grad_(False)
    before = {name: (parameter.requires_grad, parameter.clone()) for name, parameter in model.named_parameters()}
    look(model, ids)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0] and torch.equal(parameter, before[name][1])
        assert parameter.grad is None
    assert not any(view.experts._forward_hooks or view.experts._forward_pre_hooks for view in moe_layers(model))


def test_the_residual_scale_reaches_the_stream_and_not_the_gradient():
    model, ids = tiny_model("qwen3_moe"), tiny_ids(rows=1)
    plain, scaled = look(model, ids)[0].products, look(model, ids, residual_scale=0.5)[0].products
    torch.testing.assert_close(scaled.own_TE, plain.own_TE / 2)
    torch.testing.assert_close(scaled.gram_TEE, plain.gram_TEE / 4)
    torch.testing.assert_close(scaled.pull_RTE, plain.pull_RTE)


def test_promising_experts_are_ranked_without_routing_again():
    """What falls silent takes its share of the output with it; what speaks adds what the router would give it."""
    model, ids = tiny_model("qwen3_moe"), tiny_ids(rows=2)
    local = look(model, ids)[0]
    products, (kept, dropped) = local.products, (KEPT[0], [2, 4])
    old, new = local.promising(kept, dropped, 2, None)
    assert len(old) == 2 and set(old) < set(kept) and sorted(new) == dropped
    gains = {}
    for expert in kept:
        silent = products.weight_TE.clone()
        silent[:, expert] = 0
        gains[expert] = float(predict(products, silent[None], 2).gain)
    assert old == sorted(gains, key=gains.__getitem__, reverse=True)[:2]
