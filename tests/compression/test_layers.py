"""The walk over a teacher's layers changes nothing, sees every layer, and hands on what a visitor answers."""

import pytest
import torch

from moe_edge.compression.layers import LayerTokens, walk_layers
from tests.compression.action_helpers import ROWS, block_inputs
from tests.tiny import FAMILY_NAMES, tiny_model


def captured(model) -> list[LayerTokens]:
    seen: list[LayerTokens] = []
    walk_layers(model, ROWS, lambda view, tokens: seen.append(tokens))
    return seen


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_walk_changes_nothing_and_sees_every_layer(family):
    model = tiny_model(family)
    with torch.no_grad():
        before = model(ROWS).logits
        seen = captured(model)
        assert torch.equal(model(ROWS).logits, before)
    assert [tokens.hidden_TD.shape for tokens in seen] == [(256, 64)] * 2
    assert all(torch.equal(tokens.hidden_TD, hidden) for tokens, hidden in zip(seen, block_inputs(model), strict=True))


def test_a_returned_output_is_what_the_layers_above_see():
    model = tiny_model("qwen3_moe")
    plain, silent = captured(model), []

    def silence(view, tokens):
        silent.append(tokens)
        return torch.zeros_like(tokens.output_TD)

    walk_layers(model, ROWS, silence)
    assert torch.equal(silent[0].hidden_TD, plain[0].hidden_TD)
    assert not torch.allclose(silent[1].hidden_TD, plain[1].hidden_TD)
    assert torch.equal(captured(model)[1].hidden_TD, plain[1].hidden_TD)  # and the model is as before
