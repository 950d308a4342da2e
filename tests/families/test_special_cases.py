"""What only some families have: groups of experts, lists in the config, optional biases, tensors kept in float32."""

from pathlib import Path

import pytest
import torch

from moe_edge.contracts.errors import ConfigError
from moe_edge.models.loading import load_model, save_student
from moe_edge.models.pruning import check_kept, prune
from moe_edge.models.views import moe_layers, route
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.files import read_json
from tests.families.helpers import EXPERTS, LAYERS, kept_everywhere, logits, seen_by_experts
from tests.tiny import tiny_checkpoint, tiny_model


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize(
    ("ids", "top_k", "word"),
    [
        ([0, 1, 2, 4, 5], None, "every group must keep the same number"),
        ([0, 4], 1, "too few experts"),
        ([0, 1, 4, 5], 3, "top-k 3 exceeds the reachable experts"),
    ],
)
def test_groups_are_kept_whole(family: str, ids: list[int], top_k: int | None, word: str) -> None:
    model = tiny_model(family, experts=EXPERTS, layers=LAYERS)
    before = logits(model)
    if family == "deepseek_v2" and ids == [0, 4]:  # its groups are scored by one expert
        check_kept(model, kept_everywhere(model, ids), top_k)
        return
    with pytest.raises(ConfigError, match=word) as caught:
        prune(model, kept_everywhere(model, ids), top_k)
    assert caught.value.exit_code == 2 and torch.equal(logits(model), before)


def test_a_list_of_top_k_stays_a_list() -> None:
    model = tiny_model("hunyuan_v1_moe", experts=EXPERTS, layers=LAYERS)
    prune(model, {}, 1)
    assert model.config.moe_topk == [1, 1, 1]


def test_an_older_name_of_top_k_follows() -> None:
    model = tiny_model("gpt_oss", experts=EXPERTS, experts_per_token=2)
    prune(model, {}, 1)
    assert (model.config.num_experts_per_tok, model.config.experts_per_token) == (1, 1)


def test_without_groups_deepseek_v2_keeps_any_number() -> None:
    model = tiny_model("deepseek_v2", experts=EXPERTS, layers=2, topk_method="greedy", n_group=None, topk_group=None)
    check_kept(model, {1: [0, 1, 2]})
    assert moe_layers(model)[0].groups == (1, 1)


def test_lfm2_without_a_selection_bias(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "lfm2_moe", experts=EXPERTS, layers=LAYERS, use_expert_bias=False)
    model = load_model(folder)
    view = moe_layers(model)[0]
    hidden_TD, index_TK, weight_TK, _ = seen_by_experts(model, view)
    assert view.selection_bias is None and torch.equal(route(view, hidden_TD)[0], index_TK)
    prune(model, kept_everywhere(model))
    save_student(model, folder, tmp_path / "student")
    assert torch.equal(logits(load_model(tmp_path / "student")), logits(model))


def test_biases_kept_in_float32_stay_so(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "deepseek_v3", experts=EXPERTS, layers=2)
    load_model(folder, torch.bfloat16).save_pretrained(tmp_path / "half")
    kinds = {info.dtype for info in inspect_checkpoint(tmp_path / "half", require_tokenizer=False).tensors.values()}
    assert kinds == {"BF16", "F32"}
    model = load_model(tmp_path / "half", torch.bfloat16)
    assert moe_layers(model)[0].selection_bias.tensor.dtype == torch.float32
    assert read_json(tmp_path / "half" / "config.json")["dtype"] == "bfloat16"
