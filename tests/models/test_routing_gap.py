"""The routing gap tells where an honest rounding error flips an expert: checked by flipping one."""

import pytest
import torch

from moe_edge.models.routing import routing_gap, watched_gaps
from moe_edge.models.views import moe_layers, route
from tests.tiny import tiny_ids, tiny_model


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "ernie4_5_moe", "lfm2_moe"]
)
def test_the_gap_is_what_the_next_expert_lacks(family):
    """Raised by a little more than the gap, the next expert is chosen; by a little less, it is not."""
    model = tiny_model(family)
    view = moe_layers(model)[-1]
    hidden_TD = torch.randn(12, model.config.hidden_size)
    gap_T = routing_gap(view, hidden_TD)
    assert (gap_T >= 0).all() and torch.isfinite(gap_T).all()
    before = [set(row.tolist()) for row in route(view, hidden_TD)[0]]
    for token in range(12):
        flips = {
            factor: _flips(view, hidden_TD[token : token + 1], float(gap_T[token]) * factor) for factor in (0.9, 1.1)
        }
        assert before[token] not in flips[1.1] or len(flips[1.1]) > 1, (family, token)
        if view.groups[0] == 1:  # ties between groups are not looked at
            assert flips[0.9] == [before[token]], (family, token)


def _flips(view, hidden_1D, raised):
    """The distinct sets chosen when any single expert's selection score is raised."""
    found = []
    for expert in range(view.count):
        with _raised(view, expert, raised):
            chosen = set(route(view, hidden_1D)[0][0].tolist())
        if chosen not in found:
            found.append(chosen)
    return found


class _raised:
    """One expert's selection bias, or router logit, higher by an amount."""

    def __init__(self, view, expert, amount):
        bias = view.selection_bias
        self.row = None if bias is None else bias.tensor.select(bias.axis, expert)
        self.view, self.expert, self.amount = view, expert, amount

    def __enter__(self):
        if self.row is not None:
            self.row.data += self.amount
            return
        linear = torch.nn.functional.linear

        def shifted(x, weight, bias=None):
            out = linear(x, weight, bias)
            if out.shape[-1] == self.view.count:
                out = out.clone()
                out[..., self.expert] += self.amount
            return out

        self.kept, torch.nn.functional.linear = linear, shifted

    def __exit__(self, *_):
        if self.row is not None:
            self.row.data -= self.amount
        else:
            torch.nn.functional.linear = self.kept


def test_one_gap_per_layer_and_pass_and_no_hook_left():
    model = tiny_model("qwen3_moe", layers=3)
    with watched_gaps(model) as gaps, torch.no_grad():
        model(input_ids=tiny_ids(10, 1))
    assert len(gaps) == 3 and all(gap.shape == (10,) for gap in gaps)
    with torch.no_grad():
        model(input_ids=tiny_ids(10, 1))
    assert len(gaps) == 3


def test_with_all_experts_chosen_nothing_can_flip():
    model = tiny_model("qwen3_moe", experts=4, top_k=4)
    view = moe_layers(model)[0]
    assert torch.isinf(routing_gap(view, torch.randn(3, model.config.hidden_size))).all()
