"""Layers with different numbers of experts in one checkpoint: padding computes nothing, stays out, and is refused where it
would not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moe_edge.compression.on_disk import compare_parts
from moe_edge.contracts import capabilities
from moe_edge.contracts.errors import ConfigError, InputRejected, MoeEdgeError
from moe_edge.contracts.spec import places
from moe_edge.families.base import EXPERTS_PER_LAYER
from moe_edge.models.checkpoint_subsets import stream_pruned_checkpoint
from moe_edge.models.loading import load_model, save_student, stored_dtype
from moe_edge.models.padding import PADDING_BIAS, check_padding, deciding_bias, is_padded
from moe_edge.models.pruning import check_kept, masked, prune, without_padding
from moe_edge.models.students import describe_model
from moe_edge.models.views import moe_layers, router_scores
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.tiny import ALL_FAMILIES, tiny_checkpoint, tiny_ids, tiny_model
from tests.uneven_models import PADDABLE, SIZES, uneven_choice, uneven_student

IDS = tiny_ids(48, 3)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def test_real_experts_stand_at_the_beginning_of_every_group() -> None:
    assert places(3, 5) == [0, 1, 2]
    assert places(4, 8, groups=2) == [0, 1, 4, 5]


@pytest.mark.parametrize("top_k", [None, 1])
@pytest.mark.parametrize("family", PADDABLE)
def test_a_padded_student_is_the_teacher_with_the_others_masked(family: str, top_k: int | None) -> None:
    model = tiny_model(family, **SIZES).double()
    model.set_experts_implementation("eager")
    kept = uneven_choice(model)
    with masked(model, kept, top_k):
        expected = logits(model)
    prune(model, kept, top_k, uneven=True)
    assert (logits(model) - expected).abs().max() <= 2e-6  # some routers compute in float32
    counts = [len(ids) for ids in kept.values()]
    assert is_padded(model) and [len(view.real) for view in moe_layers(model)] == counts and len(set(counts)) == 2
    assert {view.count for view in moe_layers(model)} == {max(counts)}
    check_padding(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", PADDABLE)
def test_it_is_a_plain_checkpoint_and_on_disk_the_same(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    teacher = tiny_checkpoint(tmp_path, family, dtype=dtype, **SIZES)
    model = load_model(teacher, stored_dtype(inspect_checkpoint(teacher)))
    kept = uneven_choice(model)
    prune(model, kept, uneven=True)
    save_student(model, teacher, tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype)
    assert torch.equal(logits(again).float(), logits(model).float()) and is_padded(again)
    check_padding(again)
    stream_pruned_checkpoint(teacher, kept, None, tmp_path / "streamed", uneven=True)
    assert torch.equal(logits(load_model(tmp_path / "streamed", dtype)).float(), logits(model).float())
    assert (tmp_path / "streamed/config.json").read_bytes() == (tmp_path / "saved/config.json").read_bytes()
    assert compare_parts(inspect_checkpoint(teacher), inspect_checkpoint(tmp_path / "streamed"), kept) > 0


def test_numbers_in_a_streamed_padding_expert_are_found(tmp_path: Path) -> None:
    student, kept = uneven_student(tmp_path, "gpt_oss")
    weights = load_file(student / "model.safetensors")
    weights["model.layers.1.mlp.router.bias"][5] = 0.0
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoeEdgeError, match="differs from the teacher"):
        compare_parts(inspect_checkpoint(tmp_path / "tiny-gpt_oss"), inspect_checkpoint(student), kept)
    with pytest.raises(InputRejected, match="padding experts are not empty"):
        check_padding(load_model(student))


@pytest.mark.parametrize("family", PADDABLE)
def test_without_padding_the_layers_differ_and_the_function_does_not(family: str, tmp_path: Path) -> None:
    student, kept = uneven_student(tmp_path, family)
    model = load_model(student)
    expected = logits(model)
    without_padding(model)
    assert [view.count for view in moe_layers(model)] == [len(ids) for ids in kept.values()]
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)


def test_padding_is_no_parameter(tmp_path: Path) -> None:
    student, kept = uneven_student(tmp_path, "minimax_m2")
    told = describe_model(inspect_checkpoint(student))
    per_expert = 3 * 64 * 32
    assert told["params_routed"] == sum(map(len, kept.values())) * per_expert
    assert told["experts_per_layer"] == [6, 4, 4] and told["experts"] == 5
    even = describe_model(inspect_checkpoint(tmp_path / "tiny-minimax_m2"))
    dropped = 24 - 14
    assert even["params_total"] - told["params_total"] == dropped * (per_expert + 64 + 1)  # router row and bias
    assert even["params_active"] - told["params_active"] == dropped * (64 + 1)


@pytest.mark.parametrize("family", sorted(set(ALL_FAMILIES) - set(PADDABLE)))
def test_others_are_refused_before_any_change(family: str) -> None:
    model = tiny_model(family, **SIZES)
    before = logits(model)
    with pytest.raises(ConfigError, match="cannot keep different numbers of experts|top-k cannot be"):
        prune(model, uneven_choice(model), uneven=True)
    assert torch.equal(logits(model), before)


def test_without_its_bias_a_paddable_family_is_refused() -> None:
    model = tiny_model("lfm2_moe", use_expert_bias=False, **SIZES)
    with pytest.raises(ConfigError, match="a bias that only selects experts"):
        prune(model, uneven_choice(model), uneven=True)


def test_beside_a_softmax_padding_would_take_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why ernie4_5_moe is not in the table: its selection bias is added to probabilities that padding lowers."""
    monkeypatch.setitem(capabilities.PADDING, "ernie4_5_moe", "selection_bias")
    model = tiny_model("ernie4_5_moe", **SIZES)
    kept = uneven_choice(model)
    with masked(model, kept):
        expected = logits(model)
    hidden_TD, view = torch.randn(64, 64), moe_layers(model)[1]
    prune(model, kept, uneven=True)
    padding = sorted(set(range(view.count)) - set(moe_layers(model)[1].real))
    assert router_scores(view, hidden_TD)[:, padding].sum(dim=1).mean() > 0.02
    assert (logits(model) - expected).abs().max() > 1e-3


def test_uneven_layers_must_be_asked_for_and_a_padded_student_is_not_pruned_again(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss", **SIZES)
    kept = uneven_choice(model)
    with pytest.raises(ConfigError, match="same number of experts"):
        prune(model, kept)
    prune(model, kept, uneven=True)
    with pytest.raises(ConfigError, match="padded layers cannot be dropped"):
        prune(model, {layer: [0, 1, 2] for layer in range(3)})
    with pytest.raises(ConfigError, match="top-k 5 exceeds the kept experts"):  # the smallest layer has four
        check_kept(model, {}, 5)
    before = logits(model)
    prune(model, {})
    assert torch.equal(logits(model), before) and is_padded(model)


def test_groups_must_stay_even_also_under_uneven_layers() -> None:
    model = tiny_model("deepseek_v3", **SIZES)
    with pytest.raises(ConfigError, match="every group must keep the same number"):
        prune(model, {1: [0, 1, 2, 4], 2: [0, 1, 4, 5]}, uneven=True)


@pytest.mark.parametrize(
    ("family", "counts", "word"),
    [
        ("gpt_oss", [6, 4], "expected 3 numbers"),
        ("gpt_oss", [6, 4, 9], "expected 3 numbers"),
        ("gpt_oss", [6, 4, 1], "expected 3 numbers"),
        ("gpt_oss", [6, 4, True], "expected 3 numbers"),
        ("gpt_oss", [6, 4, "4"], "expected 3 numbers"),
        ("qwen3_moe", [6, 4, 4], "padded layers, but no bias"),
    ],
)
def test_an_impossible_config_is_refused(family: str, counts: list, word: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, family, **SIZES)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {EXPERTS_PER_LAYER: counts}))
    with pytest.raises(InputRejected, match=word):
        load_model(folder)


def test_the_bias_is_far_below_any_score(tmp_path: Path) -> None:
    student, _ = uneven_student(tmp_path, "glm4_moe")
    view = moe_layers(load_model(student))[1]
    bias_E = deciding_bias(view).tensor
    assert bias_E[4:].tolist() == [PADDING_BIAS] * 2 and bias_E[:4].abs().max() < 10
