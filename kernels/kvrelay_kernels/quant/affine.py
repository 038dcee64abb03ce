"""Affine quantization of K and V in NumPy: the definition that every backend's kernel is compared with."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.quant.formats import CacheFormat
from kvrelay_kernels.quant.packing import pack_codes, unpack_codes


def quantize(
    values: NDArray[Any], fmt: CacheFormat
) -> tuple[NDArray[np.uint32], NDArray[np.float16], NDArray[np.float16]]:
    """Codes, scales and biases of `[..., head_dim]` values.

    A group's bias is its minimum and its scale (maximum - minimum) / (2^bits - 1), both rounded to
    float16 first; code = round((value - bias) / scale) clipped to its bits, 0 where the scale is 0. NaN and
    infinity come into the scale or the bias, and so into all of their group; their codes are 0.
    """
    groups = np.asarray(values, np.float32).reshape(*values.shape[:-1], -1, fmt.group)
    top = float(2**fmt.code_bits - 1)
    low, high = groups.min(-1), groups.max(-1)
    with np.errstate(invalid="ignore", over="ignore"):
        scales, biases = ((high - low) / np.float32(top)).astype(np.float16), low.astype(np.float16)
        divisor = np.where(scales == 0, np.float32(1), scales.astype(np.float32))[..., None]
        steps = np.rint((groups - biases.astype(np.float32)[..., None]) / divisor)
    codes = np.where((steps > 0) & (scales[..., None] != 0), np.minimum(steps, top), 0).astype(np.uint8)
    return pack_codes(codes.reshape(values.shape), fmt.code_bits), scales, biases


def dequantize(
    words: NDArray[np.uint32], scales: NDArray[np.float16], biases: NDArray[np.float16], fmt: CacheFormat
) -> NDArray[np.float32]:
    """`[..., head_dim]` float32 values of what `quantize` gave."""
    codes = unpack_codes(words, fmt.code_bits).astype(np.float32)
    groups = codes.reshape(*codes.shape[:-1], -1, fmt.group)
    with np.errstate(invalid="ignore"):
        values = groups * scales.astype(np.float32)[..., None] + biases.astype(np.float32)[..., None]
    return values.reshape(codes.shape)
