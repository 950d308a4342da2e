"""The page of a dry run: the competition with its numbers, won and lost; contexts; shapes; a finished plan's measurements."""

import pytest

from moe_edge.contracts.manifest import Manifest
from moe_edge.planning.allocation import Packing, header_plan
from moe_edge.planning.dry_run import preview_plan
from moe_edge.planning.estimate import file_bytes
from moe_edge.planning.headers import model_headers
from moe_edge.reporting.options_text import options_text
from tests.planning.plan_helpers import NO_SHARE, config, headers
from tests.stages.inputs import EXPERTS, LAYERS, opened, run_plan
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return headers(tmp_path_factory.mktemp("teacher"))


def page(teacher, *settings, target="cpu"):
    preview = preview_plan(opened(teacher.folder), config(*settings, target=target))
    return preview.choice, options_text(preview)


def weights(teacher, experts, recipe, more=0):
    return f"target.budget.weights={file_bytes(model_headers(teacher), experts, Packing('gguf', recipe)) + more}"


def line(text, start):
    return next(row for row in text.splitlines() if row.startswith(start))


def test_quantizing_harder_wins_where_it_is_cheaper_and_both_numbers_stand_there(teacher):
    """Just below all experts at Q4_K_M: fewer bits cost some .03 nats, a dropped expert .06."""
    choice, text = page(teacher, NO_SHARE, weights(teacher, 8, "Q4_K_M", -1))
    assert choice.experts_kept == 8 and "8 of 8 experts" in line(text, "choice")
    rival = line(text, "rival")
    assert "7 of 8 experts" in rival and "(priors; the profile measures it)" in rival
    numbers = [float(word) for word in rival.replace("(", " ").split() if word.startswith("0.")]
    assert len(numbers) == 6 and numbers[0] > numbers[3], "expected KL of the rival, against that of the choice"


def test_quantizing_harder_loses_where_the_last_bits_cost_more(tmp_path):
    """Just enough for all 32 experts at the fewest bits: giving up a few leaves bits for the others."""
    many = headers(tmp_path, experts=32)
    choice, text = page(many, NO_SHARE, weights(many, 32, "Q2_K", 8192))
    assert choice.experts_kept < 32
    rival = line(text, "rival")
    assert "32 of 32 experts" in rival and "expected KL" in rival and "against" in rival
    numbers = [float(word) for word in rival.replace("(", " ").split() if word.startswith("0.")]
    assert numbers[0] > numbers[3]


def test_under_a_share_the_rival_is_named_with_numbers_and_why_it_is_not_allowed(teacher):
    choice, text = page(teacher)
    assert choice.experts_kept == 5 == header_plan(teacher, config()).choice.experts
    assert "not allowed, target.budget.experts" in line(text, "rival") and "expected KL" in line(text, "rival")


def test_the_largest_context_stands_beside_the_planned_one(teacher):
    space = header_plan(teacher, config(NO_SHARE)).space
    at = lambda tokens: space.model.spec.layers * 2 * space.model.spec.kv_heads * space.model.spec.head_dim * 2 * tokens  # noqa: E731
    planned = space.option(8, Packing("gguf", "Q4_K_M")).estimate
    tight = planned.peak_memory_bytes - at(space.context_length) + at(100)
    settings = (NO_SHARE, f"target.budget.peak_memory={tight}", "target.context_length=64")
    choice, text = page(teacher, *settings)
    assert choice.largest_contexts["f16"] == 100
    assert choice.largest_contexts["q8_0"] == int(100 * 2 / (34 / 32))
    assert "64 tokens, KV cache in f16; largest that fits: 100 in f16, 188 in q8_0" in line(text, "context")
    one_more = header_plan(teacher, config(*settings[:2], "target.context_length=101", "target.runtime.kv_cache=f16"))
    assert one_more.choice.packing.name != "Q4_K_M" or one_more.choice.experts < 8
    roomy, _ = page(teacher, NO_SHARE)
    assert set(roomy.largest_contexts.values()) == {space.model.spec.context_length}


def test_shapes_under_auto_are_listed_and_widths_shown(teacher):
    _, text = page(teacher, "plan.top_k=auto", "plan.expert_width=auto")
    assert "top-k and width are auto, these fit" in text and "  top-1, 128 neurons: 8 experts at Q4_K_M" in text
    _, text = page(teacher, "plan.expert_width=128")
    assert ", 128 neurons" in line(text, "choice") and "auto" not in text


def test_a_finished_plan_is_shown_with_its_measured_numbers_if_it_answers_the_same_wishes(tmp_path):
    folder = tiny_checkpoint(tmp_path, "qwen3_moe", experts=EXPERTS, layers=LAYERS)
    out = tmp_path / "plan"
    _, plan = run_plan(folder, out)
    wishes = config("plan.tokens=64")
    whole = wishes.model_dump(mode="json", by_alias=True)
    sections = {name: whole[name] for name in ("plan", "target", "export")}
    (out / "manifest.json").write_text(Manifest(stage="plan", key="k", digest="d", config=sections).to_json())
    found = opened(headers(tmp_path / "again", experts=EXPERTS).folder)
    text = options_text(preview_plan(found, wishes, finished=out))
    measured = line(text, "measured")
    assert f"masked KL {plan.predicted_kl_nats:.3f} nats" in measured and "bits 0.021 nats (prior)" in measured
    assert f"  rival  {plan.competitor}" in text
    assert preview_plan(found, config("plan.tokens=65"), finished=out).measured is None, "other wishes"
    assert preview_plan(found, wishes, finished=tmp_path / "none").measured is None
