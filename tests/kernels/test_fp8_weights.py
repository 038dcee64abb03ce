"""Weights in 8-bit floats: rounding, groups, and what a mode makes of a weight."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from kvrelay_kernels.quant import AffineWeight, ScaledWeight
from kvrelay_kernels.quant.weights import concatenate_scaled, in_mode, quantize_scaled, quantize_weight

LARGEST = 448
SMALLEST_NORMAL = 2.0**-6
ROWS = arrays(np.float32, (3, 40), elements=st.floats(-(2.0**100), 2.0**100, width=32))


def random_weight(rows: int, columns: int, group: int, seed: int = 0) -> ScaledWeight:
    """Codes of every number, under scales far apart."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 0x7F, (rows, columns), np.uint8) | np.uint8(0x80) * rng.integers(
        0, 2, (rows, 1), np.uint8
    )
    scales = np.exp2(rng.uniform(-9, 9, (rows, -(-columns // group)))).astype(np.float32)
    return ScaledWeight(codes, scales, group)


def values(weight: ScaledWeight) -> NDArray[np.float64]:
    """In float64, by another library's numbers."""
    numbers = weight.codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    columns = np.arange(weight.shape[1])
    return numbers * weight.scales.astype(np.float64)[:, columns // weight.group]


@pytest.mark.parametrize(("columns", "group"), [(256, 128), (200, 128), (96, 96), (40, 64), (33, 16)])
def test_values_are_those_of_the_definition(columns: int, group: int) -> None:
    weight = random_weight(6, columns, group)
    assert np.array_equal(weight.dequantize(), values(weight).astype(np.float32))
    for finer in (16, 8):
        assert np.array_equal(values(weight.regroup(finer)), values(weight))
    order = np.array([5, 0, 0, 3])
    assert np.array_equal(values(weight.rows(order)), values(weight)[order])
    if group < columns:
        with pytest.raises(ValueError, match="cannot be cut"):
            weight.regroup(48)


def test_concatenate_loses_nothing() -> None:
    parts = [random_weight(6, 200, 128, 1), random_weight(6, 200, 200, 2), random_weight(6, 200, 32, 3)]
    whole = concatenate_scaled(parts)
    assert whole.group == 32
    assert np.array_equal(values(whole), np.concatenate([values(part) for part in parts]))


@given(ROWS)
def test_rounding_is_to_the_nearest_even(weights: NDArray[np.float32]) -> None:
    found = quantize_scaled(weights)
    top = np.abs(weights).max(1, keepdims=True)
    assert np.array_equal(found.scales, top / np.float32(LARGEST))
    assert found.scales.dtype == np.float32
    whole = (found.scales >= np.finfo(np.float32).tiny)[:, 0]  # others have not all bits of a quotient
    quotients = weights[whole] / found.scales[whole]
    assert np.array_equal(
        found.codes[whole].view(ml_dtypes.float8_e4m3fn), quotients.astype(ml_dtypes.float8_e4m3fn)
    )
    error = np.abs(values(found)[whole] - weights[whole])
    bound = np.maximum(np.abs(quotients), SMALLEST_NORMAL) * found.scales[whole] * (2.0**-4 + 2.0**-22)
    assert (error <= bound).all()
    assert (np.abs(values(found)[whole]).max(1, initial=0) <= top[whole, 0] * (1 + 2.0**-22)).all()


def test_zeros_and_what_is_no_number() -> None:
    weights = np.ones((4, 16), np.float32)
    weights[1] = 0
    weights[2, 3], weights[3, 3] = np.nan, -np.inf
    found = quantize_scaled(weights).dequantize()
    np.testing.assert_allclose(found[:2], weights[:2], rtol=2.0**-23)
    assert np.isnan(found[2:]).all()


def test_what_modes_make_of_a_weight() -> None:
    weights = np.random.default_rng(4).standard_normal((8, 64)).astype(np.float32)
    small, affine = quantize_scaled(weights), quantize_weight(weights, 8, 32)
    half = weights.astype(np.float16)
    assert in_mode(small, "auto") is small
    assert in_mode(small, "fp8") is small
    assert in_mode(half, "auto") is half
    for part in (small, affine, half):
        floats = in_mode(part, "float")
        assert isinstance(floats, np.ndarray)
        assert floats.dtype == np.float32
        rounded = in_mode(part, "fp8")
        assert isinstance(rounded, ScaledWeight)
        assert np.array_equal(rounded.codes, quantize_scaled(floats).codes)
        assert isinstance(in_mode(part, "int4"), AffineWeight)
