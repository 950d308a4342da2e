"""One expert read and written, in every layout that transformers stores experts in; every large matrix as rows: none
forgotten, none twice, in place, with the right input columns."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from moe_edge.contracts.errors import InputRejected
from moe_edge.contracts.quantization import ALWAYS_F32, BIT_CLASS_OF
from moe_edge.families import FAMILIES
from moe_edge.models.views import expert_outputs, moe_layers
from moe_edge.models.weights import (
    check_width,
    expert_width,
    read_expert,
    replace_experts,
    weight_rows,
    width_key,
    write_expert,
    write_width,
)
from moe_edge.planning.headers import model_headers
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.tiny import ALL_FAMILIES, FAMILY_NAMES, tiny_checkpoint, tiny_ids, tiny_model


def gpt_oss_experts() -> nn.Module:
    """Interleaved, transposed, with biases: (E, D, 2F)."""
    config = GptOssConfig(hidden_size=8, intermediate_size=6, num_local_experts=3)
    config._experts_implementation = "eager"
    experts = GptOssExperts(config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return experts


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_was_read_is_what_the_expert_computes(family):
    view = moe_layers(tiny_model(family))[1]
    weights, hidden_TD = read_expert(view, 3), torch.randn(5, 64)
    act_TF = torch.nn.functional.silu(hidden_TD @ weights.gate_FD.T) * (hidden_TD @ weights.up_FD.T)
    with torch.no_grad():
        assert torch.allclose(act_TF @ weights.down_DF.T, expert_outputs(view, hidden_TD, [3])[0], atol=1e-5)
    assert expert_width(view) == 32


def test_interleaved_transposed_experts_with_biases():
    experts = gpt_oss_experts()
    view = SimpleNamespace(experts=experts, count=3)
    weights, hidden_TD = read_expert(view, 1), torch.randn(5, 8)
    assert [tuple(part.shape) for part in weights] == [(6, 8), (6, 8), (8, 6), (6,), (6,), (8,)]
    gate = (hidden_TD @ weights.gate_FD.T + weights.gate_bias_F).clamp(max=experts.limit)
    up = (hidden_TD @ weights.up_FD.T + weights.up_bias_F).clamp(-experts.limit, experts.limit)
    act = (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
    expected = act @ weights.down_DF.T + weights.down_bias_D
    with torch.no_grad():
        answer = experts(hidden_TD, torch.ones(5, 1, dtype=torch.long), torch.ones(5, 1))
        assert torch.allclose(answer, expected, atol=1e-4)
        order = torch.tensor([5, 3, 1, 0, 2, 4])
        write_expert(view, 1, weights.select(order))
        assert torch.allclose(
            experts(hidden_TD, torch.ones(5, 1, dtype=torch.long), torch.ones(5, 1)), expected, atol=1e-4
        )
    replace_experts(view, [read_expert(view, expert).select(torch.arange(4)) for expert in range(3)])
    assert expert_width(view) == experts.intermediate_size == 4
    assert experts.gate_up_proj.shape == (3, 8, 8) and experts.gate_up_proj_bias.shape == (3, 8)


def test_writing_back_changes_no_bit():
    for view in (moe_layers(tiny_model("olmoe"))[0], SimpleNamespace(experts=gpt_oss_experts(), count=3)):
        before = {name: tensor.clone() for name, tensor in view.experts.state_dict().items()}
        write_expert(view, 2, read_expert(view, 2))
        replace_experts(view, [read_expert(view, expert) for expert in range(view.count)])
        assert all(torch.equal(tensor, before[name]) for name, tensor in view.experts.state_dict().items())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_configuration_knows_the_new_width(family):
    model = tiny_model(family, width=64)
    check_width(model, 32)
    for view in moe_layers(model):
        replace_experts(view, [read_expert(view, expert).select(torch.arange(32)) for expert in range(view.count)])
    write_width(model, 32)
    built = type(model)(model.config)
    built.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(built.eval()(tiny_ids()).logits, model(tiny_ids()).logits)


def test_a_width_that_sizes_other_tensors_is_refused(monkeypatch):
    model = tiny_model("qwen2_moe")
    assert width_key(model) == "moe_intermediate_size"
    monkeypatch.setattr("moe_edge.models.weights.width_key", lambda model: "shared_expert_intermediate_size")
    with pytest.raises(InputRejected, match="shared_expert.* takes its size from"):
        check_width(model, 32)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_matrices_are_those_that_the_header_counts(tmp_path, family):
    """The same weights per bit class as the neutral tensor map, which the exporters follow."""
    model = tiny_model(family)
    found: dict[str, int] = {}
    for matrix in weight_rows(model):
        found[matrix.bit_class] = found.get(matrix.bit_class, 0) + matrix.rows.numel()
    headers = model_headers(inspect_checkpoint(tiny_checkpoint(tmp_path, family, with_tokenizer=False), False))
    expected: dict[str, int] = {}
    for group in headers.groups:
        if group.tensor_class not in ALWAYS_F32:
            name = BIT_CLASS_OF[group.tensor_class]
            expected[name] = expected.get(name, 0) + group.tensors * torch.Size(group.shape).numel()
    assert found == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_views_and_multiply_their_inputs(family):
    model = tiny_model(family)
    parameters = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    for matrix in weight_rows(model):
        assert parameters[matrix.rows.data_ptr()].numel() == matrix.rows.numel()
        if matrix.bit_class == "expert_down":
            hidden, width = matrix.rows.shape[-2:]
            assert (hidden, width) == (64, 32) and matrix.imatrix == "expert_down", "also where they are transposed"
        if matrix.bit_class == "expert_gate_up":
            assert matrix.rows.shape[-1] == 64 and matrix.imatrix == "expert_in"
    before = model(tiny_ids()).logits
    for matrix in weight_rows(model):
        matrix.rows.zero_()
    assert not torch.equal(before, model(tiny_ids()).logits)


def test_a_tied_embedding_is_one_matrix_with_the_heads_importance():
    ends = [matrix for matrix in weight_rows(tiny_model("qwen3_moe", tied=True)) if matrix.layer is None]
    assert [matrix.imatrix for matrix in ends] == ["head_in"]
    ends = [matrix for matrix in weight_rows(tiny_model("qwen3_moe", tied=False)) if matrix.layer is None]
    assert [matrix.imatrix for matrix in ends] == [None, "head_in"]


def test_shared_experts_and_attention_know_their_inputs():
    rows = weight_rows(tiny_model("qwen2_moe"))
    names: dict[str, set[str | None]] = {}
    for matrix in rows:
        if matrix.layer == 1:
            names.setdefault(matrix.bit_class, set()).add(matrix.imatrix)
    assert names == {
        "attention": {"attention_in", "attention_o"},
        "shared": {"ffn_in", "shared_down"},
        "expert_gate_up": {"expert_in"},
        "expert_down": {"expert_down"},
    }
