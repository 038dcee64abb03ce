import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from kvrelay_kernels.quant import parse_format
from kvrelay_kernels.quant.affine import dequantize, quantize
from kvrelay_kernels.quant.packing import WIDTHS, pack_codes, unpack_codes
from kvrelay_kernels.quant.weights import AffineWeight, concatenate, quantize_weight

FORMATS = [f"{base}-g{group}" for base in ("int8", "int6", "int4") for group in (32, 64)]
FINITE = st.floats(-1000, 1000, width=32)


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 3), st.just(64))), st.sampled_from(WIDTHS))
def test_codes_come_back(codes: NDArray[np.uint8], bits: int) -> None:
    codes &= 2**bits - 1
    words = pack_codes(codes, bits)
    assert words.shape == (len(codes), 64 * bits // 32)
    assert (unpack_codes(words, bits) == codes).all()


@given(arrays.arrays(np.uint8, 32, elements=st.integers(0, 255)), st.sampled_from(WIDTHS))
def test_code_i_sits_at_bit_i_times_bits(codes: NDArray[np.uint8], bits: int) -> None:
    codes &= 2**bits - 1
    whole = int.from_bytes(pack_codes(codes, bits).astype("<u4").tobytes(), "little")
    assert [whole >> bits * i & 2**bits - 1 for i in range(32)] == codes.tolist()


@given(arrays.arrays(np.float32, (2, 64), elements=FINITE), st.sampled_from(FORMATS))
def test_error_is_half_a_step(values: NDArray[np.float32], name: str) -> None:
    fmt = parse_format(name, 64)
    words, scales, biases = quantize(values, fmt)
    error = np.abs(dequantize(words, scales, biases, fmt) - values).reshape(2, -1, fmt.group).max(-1)
    groups = values.reshape(2, -1, fmt.group)
    # float16 rounds the bias by 2^-11 of it, and the scale by as much of itself on each of its steps;
    # below 2^-14 it has a fixed step of 2^-24, and a range that vanishes in it leaves only the bias.
    steps = 2**fmt.code_bits - 1
    slop = np.abs(groups.min(-1)) * 2**-11 + (np.ptp(groups, -1)) * 2**-11 + 2**-24 * (steps + 1)
    assert (error <= scales.astype(np.float32) / 2 + 1.01 * slop + 1e-6).all()


@given(st.sampled_from(FORMATS), FINITE)
def test_a_constant_is_its_bias(name: str, value: float) -> None:
    fmt = parse_format(name, 64)
    words, scales, biases = quantize(np.full((1, 64), value, np.float32), fmt)
    assert not words.any()
    assert not scales.any()
    assert (biases == np.float16(value)).all()


@given(
    arrays.arrays(np.float32, (3, 64), elements=FINITE), st.sampled_from([4, 8]), st.sampled_from([32, 64])
)
def test_weights_round_to_half_a_step(values: NDArray[np.float32], bits: int, group: int) -> None:
    weight = quantize_weight(values, bits, group)
    error = np.abs(weight.dequantize() - values).reshape(3, -1, group)
    assert (error <= weight.scales[..., None] / 2 + 1e-3).all()


def test_concatenate_loses_nothing() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((5, 128)).astype(np.float32)
    parts: list[AffineWeight] = [quantize_weight(values, 4, 64), quantize_weight(values, 8, 32)]
    whole = concatenate(parts)
    assert (whole.bits, whole.group) == (8, 32)
    assert (whole.dequantize() == np.concatenate([part.dequantize() for part in parts])).all()


@pytest.mark.parametrize(("bits", "count"), [(5, 32), (2, 32), (3, 16), (6, 8)])
def test_other_widths_are_refused(bits: int, count: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        pack_codes(np.zeros(count, np.uint8), bits)
