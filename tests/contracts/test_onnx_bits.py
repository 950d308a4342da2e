"""Bits and bytes of ONNX tensors: hand-computed sizes, first match wins, nonsense is refused."""

import pytest

from moe_edge.contracts.config import OnnxConfig
from moe_edge.contracts.errors import ConfigError
from moe_edge.contracts.onnx_bits import (
    PRECISIONS,
    bits_key,
    bits_of,
    fitting_block,
    refuse_absent_layers,
    stored_bytes,
    weight_class,
)


def test_bytes_of_a_matrix_by_hand() -> None:
    shape = (3, 160)  # five blocks of 32 per row: 80 bytes of codes, 10 of scales, 2.5 of zero points, which fill 3
    assert stored_bytes("attention_q", shape, 4, 32) == 3 * (80 + 10 + 3)
    assert stored_bytes("attention_q", shape, 8, 32) == 3 * (160 + 10 + 5)
    assert stored_bytes("attention_q", shape, 16, 32) == 3 * 320 and stored_bytes("router", shape, 32, 32) == 3 * 640
    expert = (2, 32, 128)  # blocks of 128 do not divide the other matrix of the expert, whose rows are 32 long
    assert stored_bytes("expert_gate", expert, 4, 128) == 2 * 32 * (64 + 8 + 2)


def test_the_first_match_wins_and_experts_of_a_dense_model_are_its_blocks() -> None:
    mix = {"expert@1-2": 8, "expert": 4, "attention@0-0": 16}
    assert [bits_of("int8", "expert", layer, mix) for layer in (0, 1, 2, 3)] == [4, 8, 8, 4]
    assert [bits_of("int4", "attention", layer, mix) for layer in (0, 1)] == [16, 8]
    assert bits_of("int4", "head", None, mix) == 8 and bits_of("int4", "router") == 32
    assert (bits_of("int4", "shared"), bits_of("int4", "shared", dense=True)) == (8, 4)
    assert all(row["router"] == 32 for row in PRECISIONS.values())


def test_every_class_of_tensor_has_its_place() -> None:
    classes = [
        "expert_up",
        "dense_down",
        "shared_gate",
        "attention_other",
        "head",
        "embedding",
        "shared_router",
        "norm",
    ]
    expected = ["expert", "shared", "shared", "attention", "head", "embedding", "router", None]
    assert [weight_class(name) for name in classes] == expected
    assert weight_class("attention_bias") is None and weight_class("selection_bias") is None


@pytest.mark.parametrize("text", ["experts", "expert@3", "expert@4-3", "norm", "router", "", "expert@-1-2"])
def test_nonsense_is_no_key(text: str) -> None:
    with pytest.raises(ValueError, match=r"CLASS or CLASS@FIRST-LAST|empty"):
        bits_key(text)
    with pytest.raises(ValueError, match=r"CLASS or CLASS@FIRST-LAST|empty"):
        OnnxConfig(layer_bits={text: 4})


def test_layers_that_a_model_lacks_are_refused() -> None:
    refuse_absent_layers({"expert@0-3": 8, "head": 4}, 4)
    with pytest.raises(ConfigError, match="expert@0-4"):
        refuse_absent_layers({"expert@0-4": 8}, 4)


def test_configuration_and_errors() -> None:
    assert OnnxConfig(layer_bits={"expert@0-1": 8, "head": 4}).mix == (("expert@0-1", "8"), ("head", "4"))
    with pytest.raises(ValueError, match="layer_bits"):
        OnnxConfig(layer_bits={"expert": 5})
    with pytest.raises(ConfigError, match="int3"):
        bits_of("int3", "expert")
    assert fitting_block(128, 576, 64) == 64 and fitting_block(64, 48) == 16
    with pytest.raises(ConfigError, match="precision=fp32"):
        fitting_block(64, 40)
