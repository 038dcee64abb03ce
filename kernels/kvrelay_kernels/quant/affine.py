"""Affine quantization of K and V in NumPy: the definition that every backend's kernel is compared with."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.quant.formats import CacheFormat


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Pack `[..., n]` codes into `[..., n * bits / 32]` words: code i at bit i * bits, little-endian."""
    if bits not in (4, 8):
        raise ValueError(f"codes of {bits} bits are not packed here")
    if bits == 4:
        codes = np.bitwise_or(codes[..., 0::2], codes[..., 1::2] << 4, dtype=np.uint8)
    return np.ascontiguousarray(codes).view("<u4")


def unpack_codes(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """The codes that `pack_codes` packed, `[..., n]`."""
    if bits not in (4, 8):
        raise ValueError(f"codes of {bits} bits are not unpacked here")
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets
    codes = np.empty((*octets.shape[:-1], octets.shape[-1] * 2), np.uint8)
    codes[..., 0::2] = octets & 15
    codes[..., 1::2] = octets >> 4
    return codes


def quantize(
    values: NDArray[Any], fmt: CacheFormat
) -> tuple[NDArray[np.uint32], NDArray[np.float16], NDArray[np.float16]]:
    """Codes, scales and biases of `[..., head_dim]` values.

    A group's bias is its minimum and its scale (maximum - minimum) / (2^bits - 1), both rounded to
    float16 first; code = round((value - bias) / scale) clipped to its bits, 0 where the scale is 0.
    """
    groups = np.asarray(values, np.float32).reshape(*values.shape[:-1], -1, fmt.group)
    top = float(2**fmt.bits - 1)
    low, high = groups.min(-1), groups.max(-1)
    scales, biases = ((high - low) / np.float32(top)).astype(np.float16), low.astype(np.float16)
    divisor = np.where(scales == 0, np.float32(1), scales.astype(np.float32))[..., None]
    codes = np.rint((groups - biases.astype(np.float32)[..., None]) / divisor)
    codes = np.where(scales[..., None] == 0, 0, np.clip(codes, 0, top)).astype(np.uint8)
    return pack_codes(codes.reshape(values.shape), fmt.bits), scales, biases


def dequantize(
    words: NDArray[np.uint32], scales: NDArray[np.float16], biases: NDArray[np.float16], fmt: CacheFormat
) -> NDArray[np.float32]:
    """`[..., head_dim]` float32 values of what `quantize` gave."""
    codes = unpack_codes(words, fmt.bits).astype(np.float32)
    groups = codes.reshape(*codes.shape[:-1], -1, fmt.group)
    values = groups * scales.astype(np.float32)[..., None] + biases.astype(np.float32)[..., None]
    return values.reshape(codes.shape)
