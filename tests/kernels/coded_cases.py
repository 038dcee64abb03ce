"""Matrices of codes, and activations, on which their kernels are tried."""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.coded_matrix import BIAS_UNIT, CodedMatrix, pack_codes
from kvrelay_kernels.quant import AffineWeight
from kvrelay_kernels.quant.weights import quantize_weight

DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
FORMS = {
    "int4-g32": (4, 32, True),
    "int4-g64-wide": (4, 64, False),
    "int8-g64": (8, 64, True),
    "int8-g32-wide": (8, 32, False),
    "int8-g16-wide": (8, 16, False),
}
"""Bits, group, and whether scales may be rounded to float16."""


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


def activations(rows: int, k: int, element: str) -> NDArray[Any]:
    """Standard normal, but a few a thousand times as large, and a row far below all others."""
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, k))
    x[:, rng.integers(0, k, 3)] *= 1000
    x[rows // 2] *= 1e-3
    return x.astype(DTYPES[element])
