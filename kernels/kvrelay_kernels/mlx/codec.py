"""Rows of K and V to what blocks hold of them, and back, on MLX; see `quant.codec`."""

from collections.abc import Mapping

import mlx.core as mx

from kvrelay_kernels.mlx import affine, scaled
from kvrelay_kernels.quant import CacheFormat


def quantize(values: mx.array, fmt: CacheFormat) -> dict[str, mx.array]:
    """The arrays of `[..., head_dim]` values by their names in `CacheFormat.parts`."""
    arrays = affine.quantize(values, fmt) if fmt.affine else scaled.quantize(values, fmt)
    return dict(zip(fmt.parts, arrays, strict=True))


def dequantize(arrays: Mapping[str, mx.array], fmt: CacheFormat) -> mx.array:
    """`[..., head_dim]` float32 values of what `quantize` gave."""
    if fmt.affine:
        return affine.dequantize(arrays["codes"], arrays["scales"], arrays["biases"], fmt)
    return scaled.dequantize(arrays["codes"], arrays["scales"], fmt)
