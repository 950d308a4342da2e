"""Every large matrix of a loaded model as rows: none forgotten, none twice, in place, with the right input columns."""

import pytest
import torch
from torch import nn

from moe_edge.contracts.quantization import ALWAYS_F32, BIT_CLASS_OF
from moe_edge.families import FAMILIES
from moe_edge.models.weights import weight_rows
from moe_edge.planning.headers import model_headers
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.tiny import ALL_FAMILIES, tiny_checkpoint, tiny_ids, tiny_model


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
            assert matrix.rows.shape[-2:] == (64, 32) and matrix.imatrix == "expert_down", (
                "hidden, width: also transposed"
            )
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
    names = {(matrix.bit_class, matrix.imatrix) for matrix in rows if matrix.layer == 1}
    assert names == {
        ("attention", "attention_in"), ("attention", "attention_o"), ("shared", "ffn_in"), ("shared", "shared_down"),
        ("expert_gate_up", "expert_in"), ("expert_down", "expert_down"),
    }  # fmt: skip
    assert sum(isinstance(module, nn.Linear) for module in tiny_model("qwen2_moe").modules()) > 0
