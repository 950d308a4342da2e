"""What rounding YaRN's range changes, against the frequencies of transformers."""

import pytest
from transformers import GptOssConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moe_edge.contracts.yarn import MAX_RAD_PER_TOKEN, rounding_error

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
