"""Scaled rotary embeddings against transformers' frequencies: Llama 3's divisors, and what rounding YaRN's range changes."""

import pytest
import torch
from transformers import GptOssConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moe_edge.contracts.rotary_scaling import MAX_RAD_PER_TOKEN, is_defined, llama3_divisors, rounding_error

REAL = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
TINY = REAL | {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def frequencies(rope, head_dim):
    config = GptOssConfig(head_dim=head_dim, rope_parameters=dict(rope), num_hidden_layers=1)
    return ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[0]


@pytest.mark.parametrize(("rope", "head_dim", "admitted"), [(REAL, 64, True), (TINY, 16, False)])
def test_the_error_is_that_of_transformers_own_rounding(rope, head_dim, admitted):
    exact, rounded = (frequencies(rope | {"truncate": truncate}, head_dim) for truncate in (False, True))
    error = rounding_error(rope | {"truncate": False}, head_dim, rope["rope_theta"])
    assert error == pytest.approx((exact - rounded).abs().max().item(), rel=1e-3) and error > 1e-5
    assert (error <= MAX_RAD_PER_TOKEN) is admitted


def test_a_rounded_range_has_no_error():
    assert rounding_error(TINY, 16, 10000.0) == 0.0


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(("changes", "head_dim"), [({}, 64), ({"factor": 8.0}, 128), ({"rope_theta": 1e4}, 16)])
def test_the_divisors_are_those_of_transformers(changes, head_dim):
    rope = LLAMA3 | changes
    scaled = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(head_dim=head_dim, rope_parameters=dict(rope)), "cpu")[0]
    plain = torch.tensor([rope["rope_theta"] ** (-2 * column / head_dim) for column in range(head_dim // 2)])
    divisors = torch.tensor(llama3_divisors(rope, head_dim, rope["rope_theta"]))
    torch.testing.assert_close(plain / divisors, scaled, rtol=1e-5, atol=0)
    assert divisors[0] == 1 and (divisors > 1).any()


@pytest.mark.parametrize(
    "changes",
    [{"factor": None}, {"factor": 0}, {"factor": "8"}, {"low_freq_factor": 4.0}, {"rope_type": "dynamic"}],
)
def test_a_type_without_its_parameters_is_not_defined(changes):
    assert is_defined(LLAMA3) and is_defined(REAL)
    assert not is_defined(LLAMA3 | changes)
