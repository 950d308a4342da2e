"""ggml's formats in memory: the same bytes as llama.cpp's quantizer writes, the same numbers as the gguf package reads."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from moe_edge.contracts.quantization import GGML_TYPES
from moe_edge.runtimes.ggml_quants import dequantize_rows, quantize_rows, round_trip, row_bytes
from moe_edge.runtimes.gguf_header import GGML_TYPE_IDS

ROWS = np.random.default_rng(0).standard_normal((70, 512)).astype(np.float32)  # more rows than one task
WEIGHTS = np.random.default_rng(1).random(512).astype(np.float32) + 0.1


@pytest.mark.parametrize("kind", GGML_TYPES)
def test_reading_back_is_what_the_gguf_package_reads(kind):
    stored = quantize_rows(kind, ROWS, WEIGHTS)
    assert stored.shape == (70, row_bytes(kind, 512)) and stored.dtype == np.uint8
    expected = dequantize(stored, GGMLQuantizationType(GGML_TYPE_IDS[kind]))
    np.testing.assert_allclose(dequantize_rows(kind, stored, 512), expected.reshape(70, 512), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0", "F16", "F32", "BF16"])
def test_plain_formats_are_the_bytes_of_the_gguf_package(kind):
    expected = quantize(ROWS, GGMLQuantizationType(GGML_TYPE_IDS[kind])).view(np.uint8)
    ours = quantize_rows(kind, ROWS)
    assert np.mean(ours == expected) > 0.999, "rounding of exact halves differs between C and numpy"


def test_finer_types_are_closer_and_an_imatrix_lowers_the_weighted_error():
    ladder = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16", "F32")
    errors = [float(((round_trip(kind, ROWS) - ROWS) ** 2).mean()) for kind in ladder]
    assert errors == sorted(errors, reverse=True) and errors[0] < 0.2 and errors[-1] == 0
    skewed = WEIGHTS**8
    for kind in ("Q2_K", "Q4_K", "IQ4_NL"):
        weighted, plain = (((round_trip(kind, ROWS, by) - ROWS) ** 2 * skewed).mean() for by in (skewed, None))
        assert weighted < plain, kind


def test_threads_change_nothing():
    for kind in ("Q3_K", "Q5_1"):
        one, many = quantize_rows(kind, ROWS, WEIGHTS, threads=1), quantize_rows(kind, ROWS, WEIGHTS, threads=4)
        assert np.array_equal(one, many)
        assert np.array_equal(dequantize_rows(kind, one, 512, 1), dequantize_rows(kind, one, 512, 4))


def test_rows_that_no_block_divides_and_wrong_weights_are_refused():
    with pytest.raises(ValueError, match="blocks of 256"):
        quantize_rows("Q4_K", ROWS[:, :96])
    with pytest.raises(ValueError, match="importances"):
        quantize_rows("Q4_K", ROWS, WEIGHTS[:96])
    with pytest.raises(ValueError, match="bytes per row"):
        dequantize_rows("Q4_K", quantize_rows("Q8_0", ROWS), 512)


def test_the_bytes_are_those_of_a_quantized_file(tmp_path):
    """Against llama_model_quantize itself, with an importance matrix."""
    from moe_edge.exporting.gguf import write_gguf
    from moe_edge.exporting.gguf_quantize import quantize_gguf
    from moe_edge.runtimes.gguf_header import check_gguf_header
    from tests.exporting.gguf_models import representable

    source, target = tmp_path / "f16.gguf", tmp_path / "q4.gguf"
    write_gguf(representable(tmp_path, "qwen3_moe", hidden=256, width=256), source, name="x")
    name = "blk.1.ffn_gate_exps.weight"
    weights = np.random.default_rng(2).random((6, 256)).astype(np.float32) + 0.1
    quantize_gguf(source, target, "Q4_K_M", {name: weights}, 1)
    full, header = check_gguf_header(source), check_gguf_header(target)
    plain, packed = full.tensors[name], header.tensors[name]
    raw = source.read_bytes()[full.data_start + plain.offset :][: plain.bytes]
    rows = np.frombuffer(raw, np.float16).astype(np.float32).reshape(plain.shape)
    ours = b"".join(quantize_rows(packed.kind, rows[e], weights[e]).tobytes() for e in range(len(rows)))
    assert ours == target.read_bytes()[header.data_start + packed.offset :][: packed.bytes]
