"""Quantization to scaled numbers in NumPy (mxfp8, mxfp4, nvfp4, turbo4, turbo3): the definition of these.

Packing, scales and numbers of the first three are MLX's (`mlx.core.quantize`), which follows the OCP
Microscaling formats 1.0, except that a scale is rounded up, so that a group's largest element is not cut off.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.quant import levels, scales
from kvrelay_kernels.quant.formats import CacheFormat, Scheme
from kvrelay_kernels.quant.levels import Levels
from kvrelay_kernels.quant.packing import pack_codes, unpack_codes


def quantize(values: NDArray[Any], fmt: CacheFormat) -> tuple[NDArray[np.uint32], NDArray[Any]]:
    """Codes and scales of `[..., head_dim]` values.

    A group is divided by its scale as it is stored (by 1 where that is 0) and goes to the nearest numbers.
    """
    kind, table = fmt.scheme.scales, _levels(fmt.scheme)
    groups = np.asarray(values, np.float32).reshape(*values.shape[:-1], -1, fmt.group)
    stored = scales.encode(_sizes(groups, fmt, table), kind)
    divisor: NDArray[Any] = scales.decode(stored, kind)
    divisor = np.where(divisor == 0, np.float32(1), divisor)[..., None]
    with np.errstate(invalid="ignore", over="ignore"):
        quotients: NDArray[Any] = groups / divisor
    codes = levels.encode(quotients, table)
    return pack_codes(codes.reshape(values.shape), fmt.code_bits), stored


def dequantize(words: NDArray[np.uint32], stored: NDArray[Any], fmt: CacheFormat) -> NDArray[np.float32]:
    """`[..., head_dim]` float32 values of what `quantize` gave."""
    codes = unpack_codes(words, fmt.code_bits)
    numbers = levels.decode(codes, _levels(fmt.scheme)).reshape(*codes.shape[:-1], -1, fmt.group)
    with np.errstate(invalid="ignore", over="ignore"):
        values = numbers * scales.decode(stored, fmt.scheme.scales)[..., None]
    return values.reshape(codes.shape)


def _sizes(groups: NDArray[np.float32], fmt: CacheFormat, table: Levels) -> NDArray[np.float32]:
    """What a group is divided by: the root of its mean square where the codebook is for a standard normal;
    else, what takes its largest element to the largest number.

    Squares are summed as a tree of halves, so that every backend finds the same bits.
    """
    if not fmt.rotates_values:
        return np.abs(groups).max(-1) / np.float32(levels.largest(table))
    with np.errstate(over="ignore"):
        squares = np.square(groups)
        while squares.shape[-1] > 1:
            low, high = np.split(squares, 2, -1)
            squares = low + high
    return np.sqrt(squares[..., 0] * np.float32(1 / fmt.group))


def _levels(scheme: Scheme) -> Levels:
    if scheme.levels is None:
        raise ValueError("codes of this format are steps above a bias: see affine.py")
    return scheme.levels
