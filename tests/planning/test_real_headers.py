"""The solver on the headers of a real model: Qwen3-30B-A3B against the shipped targets, without a weight."""

import pytest

from moe_edge.contracts.config_io import resolve_config
from moe_edge.contracts.errors import InfeasibleError
from moe_edge.contracts.targets_io import list_targets, read_target
from moe_edge.planning.allocation import header_plan
from moe_edge.planning.bits import prior_sensitivity
from moe_edge.planning.estimate import Cache, Packing, kv_cache_bytes
from moe_edge.planning.headers import model_headers
from moe_edge.planning.spend import allocate
from moe_edge.storage.checkpoint import inspect_checkpoint
from tests.benchmarks.bench_solver import HEADER, row
from tests.qwen3_30b import write_headers_only


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    return inspect_checkpoint(write_headers_only(tmp_path_factory.mktemp("qwen3-30b")))


def solve(headers, target, *settings):
    return header_plan(headers, resolve_config(read_target(target), settings=["export.formats=[gguf]", *settings]))


def test_the_counts_are_the_published_ones(headers):
    seen = model_headers(headers)
    assert seen.params_total(128) == pytest.approx(30.5e9, rel=0.01), "30.5 B"
    assert seen.params_active(128, 8) == pytest.approx(3.3e9, rel=0.02), "3.3 B with the embedding"
    assert kv_cache_bytes(seen, Cache(1)) == pytest.approx(98e3, rel=0.01), "98 kB per token in float16"
    assert headers.total_bytes == pytest.approx(61e9, rel=0.01)


@pytest.mark.parametrize(("experts", "gigabytes"), [(128, 18.5), (96, 14.1), (64, 9.7), (32, 5.3)])
def test_sizes_are_close_to_those_of_llama_cpps_own_mix(headers, experts, gigabytes):
    """Ours keeps attention and head at six bits or more, which shows where few experts are left."""
    found = solve(headers, "jetson-thor").space.option(experts, Packing("gguf", "Q4_K_M"))
    assert found.estimate.file_bytes / 1e9 == pytest.approx(gigabytes, rel=0.07)


def test_large_boards_keep_everything_and_small_ones_prune(headers):
    assert solve(headers, "jetson-thor").keeps_all and solve(headers, "jetson-agx-orin-64gb").keeps_all
    nx = solve(headers, "jetson-orin-nx-16gb")
    assert 64 <= nx.choice.experts < 128 and nx.rival.experts == 128 and "does not fit" in nx.competitor
    nano = solve(headers, "jetson")
    assert nano.choice.experts < 64 and any(note.startswith("Unsafe") for note in nano.notes)
    assert solve(headers, "mobile-mid").choice.experts < nano.choice.experts


def test_the_roofline_reads_active_weights_only(headers):
    """A ceiling of 91 tokens/s at the full 204.8 GB/s (reference calculation), times the target's efficiency."""
    speed = solve(headers, "jetson-agx-orin-64gb", "target.context_length=4096").choice.estimate.decode_tokens_per_s
    assert 0.7 * 91 * 0.75 < speed < 0.7 * 91


def test_every_target_is_answered(headers):
    rows = [row(headers, target, ["export.formats=[gguf]"]) for target in list_targets()]
    rows.append(row(headers, "cpu", ["export.formats=[gguf, onnx]"]))
    assert len(rows) == 9 and all(line.count("|") == HEADER.count("|") for line in rows)


def test_bits_are_spent_at_this_size(headers):
    nx = solve(headers, "jetson-orin-nx-16gb", "target.budget.weights=12GiB")
    option, nats = allocate(nx.space, 128, prior_sensitivity(nx.model))
    assert option.fits and option.estimate.file_bytes <= 12 * 2**30 and nats > 0
    assert allocate(nx.space, 64, prior_sensitivity(nx.model))[1] < nats


def test_a_speed_that_no_recipe_reaches_is_met_by_a_mix_and_beyond_that_a_top_k_is_named(headers):
    """48 layers of 128 experts: at 45 tokens/s a 16 GB Orin needs all classes at the fewest bits, a phone another top-k."""
    fast = "target.budget.decode_tokens_per_s=45"
    nx = solve(headers, "jetson-orin-nx-16gb", fast)
    assert nx.choice.packing.mix and nx.choice.estimate.decode_tokens_per_s >= 45
    assert not any(nx.space.option(8, Packing("gguf", name)).fits for name in ("Q2_K", "Q3_K_M", "Q4_K_M"))
    with pytest.raises(InfeasibleError, match="at top-6 this would meet every budget") as caught:
        solve(headers, "mobile", fast)
    assert "--set plan.top_k=6" in caught.value.next_command
    assert solve(headers, "mobile", fast, "plan.top_k=6").choice.fits
