"""Rows of K and V to what blocks hold of them, and back, in any quantized format."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.quant import affine, scaled
from kvrelay_kernels.quant.formats import CacheFormat


def quantize(values: NDArray[Any], fmt: CacheFormat) -> dict[str, NDArray[Any]]:
    """The arrays of `[..., head_dim]` values by their names in `CacheFormat.parts`."""
    arrays = affine.quantize(values, fmt) if fmt.affine else scaled.quantize(values, fmt)
    return dict(zip(fmt.parts, arrays, strict=True))


def dequantize(arrays: Mapping[str, NDArray[Any]], fmt: CacheFormat) -> NDArray[np.float32]:
    """`[..., head_dim]` float32 values of what `quantize` gave."""
    if fmt.affine:
        return affine.dequantize(arrays["codes"], arrays["scales"], arrays["biases"], fmt)
    return scaled.dequantize(arrays["codes"], arrays["scales"], fmt)
