"""The page of a dry run: the competition with its numbers, won and lost; contexts; shapes; a finished plan's measurements."""

import json

import pytest

from moe_edge.contracts.manifest import Manifest
from moe_edge.contracts.preview import PlanPreview
from moe_edge.pipeline import STAGES
from moe_edge.planning.allocation import Packing, header_plan
from moe_edge.planning.dry_run import preview_plan
from moe_edge.planning.estimate import file_bytes
from moe_edge.planning.headers import model_headers
from moe_edge.reporting.options_text import options_text
from tests.compression.action_helpers import plan8
from tests.planning.plan_helpers import NO_SHARE, config, headers
from tests.stages.inputs import opened


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return headers(tmp_path_factory.mktemp("teacher"))


def page(teacher, *settings, target="cpu"):
    preview = preview_plan(opened(teacher.folder), config(*settings, target=target))
    assert PlanPreview.model_validate(json.loads(json.dumps(preview.to_dict()))) == preview
    return preview, options_text(preview)


def weights(teacher, experts, recipe, more=0):
    return f"target.budget.weights={file_bytes(model_headers(teacher), experts, Packing('gguf', recipe)) + more}"


def line(text, start):
    return next(row for row in text.splitlines() if row.startswith(start))


def test_quantizing_harder_wins_where_it_is_cheaper_and_both_numbers_stand_there(teacher):
    """Just below all experts at Q4_K_M: fewer bits cost some .03 nats, a dropped expert .06."""
    preview, text = page(teacher, NO_SHARE, weights(teacher, 8, "Q4_K_M", -1))
    assert preview.choice.experts_kept == 8 and "8 of 8 experts" in line(text, "choice")
    rival = line(text, "rival")
    assert "7 of 8 experts" in rival and "(priors; the profile measures it)" in rival
    numbers = [float(word) for word in rival.replace("(", " ").split() if word.startswith("0.")]
    assert len(numbers) == 6 and numbers[0] > numbers[3], "expected KL of the rival, against that of the choice"


def test_quantizing_harder_loses_where_the_last_bits_cost_more(tmp_path):
    """Just enough for all 32 experts at the fewest bits: giving up a few leaves bits for the others."""
    many = headers(tmp_path, experts=32)
    preview, text = page(many, NO_SHARE, weights(many, 32, "Q2_K", 8192))
    assert preview.choice.experts_kept < 32
    rival = line(text, "rival")
    assert "32 of 32 experts" in rival and "expected KL" in rival and "against" in rival
    numbers = [float(word) for word in rival.replace("(", " ").split() if word.startswith("0.")]
    assert numbers[0] > numbers[3]


def test_under_a_share_the_rival_is_named_with_numbers_and_why_it_is_not_allowed(teacher):
    preview, text = page(teacher)
    assert preview.choice.experts_kept == 5 == header_plan(teacher, config()).choice.experts
    assert "not allowed, target.budget.experts" in line(text, "rival") and "expected KL" in line(text, "rival")


def test_the_largest_context_stands_beside_the_planned_one(teacher):
    space = header_plan(teacher, config(NO_SHARE)).space
    at = lambda tokens: space.model.spec.layers * 2 * space.model.spec.kv_heads * space.model.spec.head_dim * 2 * tokens  # noqa: E731
    choice = space.option(8, Packing("gguf", "Q4_K_M")).estimate
    tight = choice.peak_memory_bytes - at(space.context_length) + at(100)
    settings = (NO_SHARE, f"target.budget.peak_memory={tight}", "target.context_length=64")
    preview, text = page(teacher, *settings)
    assert preview.choice.largest_contexts["f16"] == 100
    assert preview.choice.largest_contexts["q8_0"] == int(100 * 2 / (34 / 32))
    assert "64 tokens, KV cache in f16; largest that fits: 100 in f16, 188 in q8_0" in line(text, "context")
    one_more = header_plan(teacher, config(*settings[:2], "target.context_length=101", "target.runtime.kv_cache=f16"))
    assert one_more.choice.packing.name != "Q4_K_M" or one_more.choice.experts < 8
    roomy, _ = page(teacher, NO_SHARE)
    assert set(roomy.choice.largest_contexts.values()) == {space.model.spec.context_length}


def test_rows_say_their_kv_precision_and_that_speeds_of_two_do_not_compare(teacher):
    space = header_plan(teacher, config(NO_SHARE)).space
    peak = space.option(8, Packing("gguf", "Q4_K_M")).estimate.peak_memory_bytes - 1
    preview, text = page(teacher, NO_SHARE, f"target.budget.peak_memory={peak}")
    rows = dict(zip(text.split("decode\n")[1].splitlines(), preview.options, strict=False))
    assert {option.kv_precision for option in preview.options} == {"f16", "q8_0"}
    assert all(option.kv_precision in row.split() for row, option in rows.items())
    assert "compare decode speeds within one precision" in text
    _, text = page(teacher, NO_SHARE, "target.runtime.kv_cache=f16")
    assert "compare decode speeds" not in text


def test_shapes_under_auto_are_listed_and_widths_shown(teacher):
    _, text = page(teacher, "plan.top_k=auto", "plan.expert_width=auto")
    assert "top-k and width are auto, these fit" in text and "  top-1, 128 neurons: 8 experts at Q4_K_M" in text
    _, text = page(teacher, "plan.expert_width=128")
    assert ", 128 neurons" in line(text, "choice") and "auto" not in text


MEASURED = {
    "predicted_kl_nats": 0.25,
    "quantization_kl_nats": {"Q8_0": 0.021, "Q8_0-mix": 0.034},
    "competitor": "all experts in fewer bits",
}


def test_a_finished_plan_is_shown_with_its_measured_numbers(teacher):
    preview, text = page(teacher)
    assert preview.measured is None and "\nmeasured " not in text
    plan = plan8(**MEASURED)
    text = options_text(preview.model_copy(update={"measured": plan}))
    assert line(text, "measured").startswith("measured 4 of 8 experts, top-")
    assert "Q8_0, by frequency: masked KL 0.250 nats, bits 0.021 nats (prior)" in line(text, "measured")
    assert "  rival  all experts in fewer bits" in text
    mixed = plan.model_copy(update={"quantization_by_class": {"attention": "Q6_K"}, "competitor": None})
    text = options_text(preview.model_copy(update={"measured": mixed}))
    assert "Q8_0-mix, by frequency: masked KL 0.250 nats, bits 0.034 nats" in text and "  rival  " not in text


def test_a_finished_plan_is_found_if_it_answers_the_same_wishes(teacher, tmp_path):
    plan, wishes, checkpoint = plan8(**MEASURED), config("plan.tokens=64"), opened(teacher.folder)
    (tmp_path / "plan.json").write_text(plan.to_json())
    stage = next(stage for stage in STAGES if stage.name == "plan")
    manifest = Manifest(stage="plan", key="k", digest="d", config=stage.config_for_key(wishes))
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    preview = preview_plan(checkpoint, wishes, finished=tmp_path)
    assert preview.measured == plan and not {"kept", "merges"} & preview.to_dict()["measured"].keys()
    assert preview_plan(checkpoint, config("plan.tokens=65"), finished=tmp_path).measured is None, "other wishes"
    assert preview_plan(checkpoint, wishes, finished=tmp_path / "none").measured is None
