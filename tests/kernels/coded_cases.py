"""Matrices of codes, and activations, on which their kernels are tried."""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.coded_matrix import BIAS_UNIT, CodedMatrix, pack_codes
from kvrelay_kernels.quant import AffineWeight, ScaledWeight
from kvrelay_kernels.quant.levels import decode_e4m3
from kvrelay_kernels.quant.weights import quantize_weight

DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
E4M3_UNITS = 256
"""What a half is short of that has the bits of an 8-bit float."""
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
FORMS = {
    "int4-g32": (4, 32, True),
    "int4-g64-wide": (4, 64, False),
    "int8-g64": (8, 64, True),
    "int8-g32-wide": (8, 32, False),
    "int8-g16-wide": (8, 16, False),
}
"""Bits, group, and whether scales may be rounded to float16."""
FLOAT_FORMS: dict[str, int | None] = {"fp8-row": None, "fp8-g128": 128, "fp8-g32": 32}
"""Of 8-bit floats, by their groups; None: whole rows."""


def float_weight(name: str, n: int, k: int) -> tuple[CodedMatrix, ScaledWeight]:
    """A matrix of all numbers that there are, under scales far apart, and what it was packed from."""
    rng = np.random.default_rng(n * k)
    signs = rng.integers(0, 2, (n, k), np.uint8) * np.uint8(0x80)
    codes = rng.integers(0, 0x7F, (n, k), np.uint8) | signs
    group = FLOAT_FORMS[name] or k
    scales = np.exp2(rng.uniform(-20, -10, (n, -(-k // group)))).astype(np.float32)
    weight = ScaledWeight(codes, scales, group)
    matrix = pack_codes([weight])
    assert matrix is not None
    return matrix, weight


def coded_weight(name: str, n: int, k: int) -> tuple[CodedMatrix, AffineWeight]:
    """A matrix in a form, and what it was packed from, with the scales that it has."""
    bits, group, rounded = FORMS[name]
    codes = quantize_weight(
        np.random.default_rng(n * k).standard_normal((n, k)).astype(np.float32), bits, group
    )
    matrix = pack_codes([codes], rounded)
    assert matrix is not None
    assert (matrix.factors.dtype == np.float16) == rounded
    return matrix, rounded_scales(codes, matrix.unit) if rounded else codes


def rounded_scales(codes: AffineWeight, unit: float) -> AffineWeight:
    """Scales and biases as a matrix of this unit has them in float16."""
    scales, biases = (
        (part / np.float32(one)).astype(np.float16) * np.float32(one)
        for part, one in ((codes.scales, unit), (codes.biases, unit * BIAS_UNIT))
    )
    return AffineWeight(codes.codes, scales, biases, codes.bits)


def halves(codes: AffineWeight, unit: float) -> NDArray[np.float64]:
    """A matrix as kernels on Hopper multiply with it: scales, then values rounded to halves."""
    part = rounded_scales(codes, unit)
    factors = (part.scales.astype(np.float64), part.biases.astype(np.float64))
    scales, biases = (np.repeat(each, part.group, 1) for each in factors)
    one = unit * BIAS_UNIT
    return ((part.codes * scales + biases) / one).astype(np.float16).astype(np.float64) * one


def float_halves(weight: ScaledWeight, unit: float) -> NDArray[np.float64]:
    """A matrix of 8-bit floats as kernels on Hopper multiply with it: scales, then values in halves.

    Scales of rows come to the sums.
    """
    if weight.scales.shape[1] == 1:
        return decode_e4m3(weight.codes) * weight.scales.astype(np.float64)
    scales = (weight.regroup(1).scales / unit).astype(np.float16).astype(np.float64)
    numbers = decode_e4m3(weight.codes).astype(np.float64) / E4M3_UNITS
    return (numbers * scales).astype(np.float16).astype(np.float64) * (unit * E4M3_UNITS)


def half_steps(x: NDArray[Any], group: int) -> NDArray[np.float64]:
    """What each of x may miss when it is rounded to 16-bit integers for a matrix with such groups."""
    columns = min(32, group)
    sizes = np.abs(x.astype(np.float64))
    largest = np.pad(sizes, ((0, 0), (0, -x.shape[1] % columns))).reshape(len(x), -1, columns).max(-1)
    return np.repeat(largest, columns, 1)[:, : x.shape[1]] / (2 * 32639) * (1 + 2.0**-6)


def activations(rows: int, k: int, element: str) -> NDArray[Any]:
    """Standard normal, but a few a thousand times as large, and a row far below all others."""
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, k))
    x[:, rng.integers(0, k, 3)] *= 1000
    x[rows // 2] *= 1e-3
    return x.astype(DTYPES[element])
