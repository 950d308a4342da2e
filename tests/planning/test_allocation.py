"""The budget solver: what it chooses, what it refuses, and what it says about the other way."""

from dataclasses import replace

import pytest

from moe_edge.contracts.errors import ConfigError, InfeasibleError, InputRejected
from moe_edge.planning.allocation import header_plan
from moe_edge.planning.estimate import Packing, file_bytes
from moe_edge.planning.headers import model_headers
from moe_edge.planning.notes import describe
from tests.planning.plan_helpers import NO_SHARE, config, headers

WHOLE = "plan.expert_width=keep"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return headers(tmp_path_factory.mktemp("teacher"))


def size(teacher, experts, recipe):
    return file_bytes(model_headers(teacher), experts, Packing("gguf", recipe))


def solve(teacher, *settings, target="cpu"):
    return header_plan(teacher, config(*settings, target=target))


def test_a_share_keeps_at_most_that_share_in_the_preferred_type(teacher):
    answer = solve(teacher)
    assert (answer.choice.experts, answer.quantization, answer.onnx_precision) == (5, "Q4_K_M", "int4")
    assert answer.rival.experts == 8 and "at most 62.5 %" in answer.competitor
    assert any("Decoding still reads" in note for note in answer.notes)
    assert solve(teacher, "target.budget.experts=74.9%").choice.experts == 5


@pytest.mark.parametrize("target", ["jetson", "mobile"])
def test_a_roomy_budget_keeps_every_expert(teacher, target):
    answer = solve(teacher, target=target)
    assert answer.keeps_all and answer.quantization == "Q4_K_M" and answer.competitor is None


def test_all_budgets_hold_together(teacher):
    tight = size(teacher, 4, "Q4_K_M")
    answer = solve(teacher, f"target.budget.weights={tight}")
    assert answer.choice.experts == 4 and answer.choice.estimate.file_bytes <= tight, "fewer than the share's 5"
    wide = solve(teacher, "target.budget.weights=4GiB")
    assert wide.choice.experts == 5
    with pytest.raises(InfeasibleError):
        solve(teacher, "target.budget.weights=4GiB", "target.budget.peak_memory=1MiB")


def test_an_absolute_budget_walks_types_first_then_experts_then_smaller_types(teacher):
    at = lambda limit: solve(teacher, NO_SHARE, f"target.budget.weights={limit}")  # noqa: E731
    assert describe(at(size(teacher, 8, "Q4_K_M")).choice, at(10**9).model).startswith("8 of 8 experts at Q4_K_M")
    pruned = at(size(teacher, 8, "Q4_K_M") - 1)
    assert pruned.choice.packing.name == "Q4_K_M" and pruned.choice.experts == 7
    smaller = at(size(teacher, 4, "Q4_K_M") - 1)
    assert smaller.choice.packing.name in ("Q4_0", "Q3_K_M", "Q2_K") and smaller.choice.experts >= 4
    last = at(size(teacher, 2, "Q2_K"))
    assert (last.choice.experts, last.choice.packing.name) == (2, "Q2_K")
    assert any(note.startswith("Unsafe: 75%") for note in last.notes)


def test_a_share_of_the_teachers_16_bit_bytes_is_the_same_budget_as_those_bytes(teacher):
    most = model_headers(teacher).bytes_at_16_bits * 3 // 10
    share, absolute = (solve(teacher, NO_SHARE, f"target.budget.{key}") for key in ("bytes=30%", f"weights={most}"))
    assert share.space.limits == absolute.space.limits and share.space.limits.weights_bytes == most
    assert share.choice.estimate == absolute.choice.estimate and share.competitor == absolute.competitor
    both = solve(teacher, NO_SHARE, "target.budget.bytes=30%", f"target.budget.weights={most - 4096}")
    assert both.space.limits.weights_bytes == most - 4096, "both hold, so the lesser one does"


def test_a_share_of_bytes_that_nothing_meets_names_the_one_that_would_do(teacher):
    wishes = (NO_SHARE, "plan.experts=8", "plan.bits=Q8_0", "plan.expert_width=keep")
    with pytest.raises(InfeasibleError, match=r"target\.budget\.bytes is .* KiB") as caught:
        solve(teacher, *wishes, "target.budget.bytes=1%", "plan.top_k=8")
    fix = str(caught.value).split("--set ")[-1].strip()
    assert fix.startswith("target.budget.bytes=") and solve(teacher, *wishes, fix, "plan.top_k=8").choice.experts == 8


def test_plan_experts_overrides_the_targets_share(teacher):
    assert solve(teacher, "plan.experts=7").choice.experts == 7
    assert solve(teacher, "plan.experts=0.5").choice.experts == 4
    assert solve(teacher, "plan.experts=1.0").keeps_all
    assert "plan.experts=7" in solve(teacher, "plan.experts=7").competitor


def test_bits_are_obeyed_and_an_export_list_narrows_the_types(teacher):
    assert solve(teacher, "plan.bits=Q6_K").quantization == "Q6_K"
    assert solve(teacher, "export.gguf.types=[Q8_0]").quantization == "Q8_0"
    assert solve(teacher, "export.gguf.types=[F16, Q4_K_M]").quantization == "Q4_K_M"
    onnx = solve(teacher, "export.formats=[onnx]", "export.onnx.precision=int8")
    assert (onnx.onnx_precision, onnx.quantization, onnx.rival) == ("int8", "Q4_K_M", None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("plan.top_k=6", "top-k 6 exceeds the 5 kept experts"),
        ("plan.top_k=9", "top-k 9 is impossible"),
        ("plan.top_k=0", "top-k 0 is impossible"),
        ("plan.experts=1", "top-k 2 exceeds the 1 kept experts"),
        ("plan.experts=9", "cannot keep 9 experts"),
        ("plan.experts=0", "cannot keep 0 experts"),
        ("plan.bits=Q4_KM", "did you mean 'Q4_K_M'"),
        ("plan.criterion=reep", "did you mean 'reap'"),
        ("plan.expert_width=100", "impossible expert width"),
        ("plan.expert_width=512", "impossible expert width"),
    ],
)
def test_impossible_wishes_are_a_config_error(teacher, setting, message):
    whole = () if setting.startswith("plan.expert_width") else (WHOLE,)
    with pytest.raises(ConfigError, match=message) as caught:
        solve(teacher, setting, *whole)
    assert caught.value.exit_code == 2


def test_a_share_below_top_k_is_infeasible_and_says_which_share_would_do(teacher):
    with pytest.raises(InfeasibleError, match="target.budget.experts=25%") as caught:
        solve(teacher, "target.budget.experts=20%", WHOLE)
    assert caught.value.exit_code == 3
    assert solve(teacher, "target.budget.experts=20%", "plan.top_k=1", WHOLE).choice.experts == 1
    narrow = solve(teacher, "target.budget.experts=20%")
    assert narrow.choice.experts >= 2 and narrow.choice.estimate.routed_expert_share_kept <= 0.2, "or narrower ones"


def test_nothing_fits_is_refused_with_the_nearest_options(teacher):
    least = size(teacher, 2, "Q2_K")
    mixed = solve(teacher, NO_SHARE, f"target.budget.weights={least - 1}").choice
    assert mixed.packing.mix and mixed.estimate.file_bytes < least, "fewer bits than any recipe has"
    with pytest.raises(InfeasibleError) as caught:
        solve(teacher, NO_SHARE, f"target.budget.weights={least // 2}")
    assert caught.value.exit_code == 3 and "Q2_K" in str(caught.value)
    half = size(teacher, 4, "Q2_K")
    assert caught.value.next_command == f"--set target.budget.weights={half}", "no advice to drop more than half"
    with pytest.raises(InfeasibleError) as caught:
        solve(teacher, NO_SHARE, "plan.experts=2", f"target.budget.weights={least // 2}")
    assert caught.value.next_command == f"--set target.budget.weights={least}", "it was asked for"


def test_a_fitting_option_with_other_settings_is_named_first(teacher):
    limit = size(teacher, 6, "Q4_K_M")
    with pytest.raises(InfeasibleError) as caught:
        solve(teacher, NO_SHARE, "plan.bits=Q8_0", "plan.experts=6", f"target.budget.weights={limit}")
    assert "fits" in str(caught.value) and "--set plan.experts=" in caught.value.next_command


def test_decode_speed_is_a_budget_where_the_bandwidth_is_known(teacher):
    with pytest.raises(InfeasibleError, match="tokens/s"):
        solve(teacher, "target.budget.decode_tokens_per_s=1e9", target="mobile")
    notes = solve(teacher, "target.budget.decode_tokens_per_s=5", "target.budget.ttft=2s").notes
    assert any("bandwidth is unknown" in note for note in notes) and any("ttft" in note for note in notes)


def test_a_model_that_a_format_cannot_represent_is_refused_before_any_work(tmp_path):
    odd = headers(tmp_path, "qwen3_moe", norm_topk_prob=False)
    with pytest.raises(InputRejected, match="norm_topk_prob") as caught:
        solve(odd)
    assert caught.value.exit_code == 4 and "export.formats=[onnx]" in caught.value.next_command
    assert solve(odd, "export.formats=[onnx]").choice.experts == 5


def test_no_format_means_the_checkpoint_alone(teacher):
    answer = solve(teacher, "export.formats=[]")
    assert (answer.choice.experts, answer.quantization, answer.rival) == (5, "F16", None)
    assert any("Only the transformers checkpoint" in note for note in answer.notes)


def test_narrower_experts_count_in_a_share_and_in_the_sizes(teacher):
    answer = solve(teacher, "plan.expert_width=128")
    assert answer.keeps_all and answer.choice.estimate.routed_expert_share_kept == 0.5
    assert answer.choice.estimate.file_bytes < size(teacher, 5, "Q4_K_M")
    assert any("expert width 128" in note for note in answer.notes)


def test_actions_that_cannot_work_are_refused_from_headers(teacher):
    with pytest.raises(InfeasibleError, match="shared core"):
        solve(teacher, "plan.action=shared-core", "target.budget.weights=4GiB")
    assert solve(teacher, "plan.action=shared-core", "plan.force=true").choice.fits


def test_a_dense_student_reads_all_that_it_keeps(teacher):
    dense, sparse = (solve(teacher, f"plan.action={action}", target="mobile") for action in ("dense", "drop"))
    assert dense.choice.estimate.file_bytes == sparse.choice.estimate.file_bytes
    assert dense.choice.estimate.decode_tokens_per_s < sparse.choice.estimate.decode_tokens_per_s


def test_an_8_bit_cache_is_taken_where_only_it_fits(teacher):
    generous = solve(teacher, NO_SHARE, "target.context_length=65536")
    needed = generous.choice.estimate.peak_memory_bytes
    assert generous.choice.estimate.kv_precision == "f16"
    tight = solve(teacher, NO_SHARE, "target.context_length=65536", f"target.budget.peak_memory={needed - 1}")
    assert (
        tight.keeps_all
        and tight.choice.estimate.kv_precision == "q8_0"
        and tight.choice.estimate.peak_memory_bytes < needed
    )
    assert any("-ctk q8_0" in note for note in tight.notes)
    just_too_little = ("target.context_length=65536", f"target.budget.peak_memory={needed - 1}")
    fixed = solve(teacher, NO_SHARE, *just_too_little, "target.runtime.kv_cache=f16")
    assert fixed.choice.estimate.kv_precision == "f16" and not fixed.keeps_all


def test_no_context_is_planned_beyond_what_the_model_reads_and_the_plan_says_so(teacher):
    limit = model_headers(teacher).spec.context_length
    at = lambda tokens: solve(teacher, NO_SHARE, f"target.context_length={tokens}")  # noqa: E731
    assert at(limit + 1).choice == at(limit).choice and at(limit + 1).choice.estimate.context_length == limit
    said = [[note for note in at(tokens).notes if "the model reads at most" in note] for tokens in (limit, limit + 1)]
    assert said[0] == [] and str(limit + 1) in said[1][0]
    assert not any("nothing fits" in note for note in at(limit + 1).notes)


def test_a_shorter_context_is_taken_only_where_the_target_allows_it(teacher):
    teacher = replace(teacher, config={**teacher.config, "max_position_embeddings": 1048576})
    settings = (NO_SHARE, "target.context_length=1048576", "target.budget.peak_memory=110MiB")
    with pytest.raises(InfeasibleError, match="fits .* tokens of context") as caught:
        solve(teacher, *settings)
    assert caught.value.next_command.startswith("--set target.context_length=")
    answer = solve(teacher, *settings, "target.context_least=1024")
    assert (
        1024 <= answer.space.context_length < 1048576
        and answer.choice.estimate.context_length == answer.space.context_length
    )
    assert any("target.context_least allows 1024" in note for note in answer.notes)
