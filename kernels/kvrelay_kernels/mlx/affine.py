"""Affine codes of K and V on MLX, step by step as `quant.affine` defines them, so that the bytes agree."""

import mlx.core as mx

from kvrelay_kernels.mlx.packing import pack_codes
from kvrelay_kernels.quant import CacheFormat


def quantize(values: mx.array, fmt: CacheFormat) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and biases of `[..., head_dim]` values."""
    groups = values.astype(mx.float32).reshape(*values.shape[:-1], -1, fmt.group)
    top = float(2**fmt.code_bits - 1)
    low, high = groups.min(-1), groups.max(-1)
    scales, biases = ((high - low) / top).astype(mx.float16), low.astype(mx.float16)
    divisor = mx.where(scales == 0, 1.0, scales.astype(mx.float32))[..., None]
    steps = mx.round((groups - biases.astype(mx.float32)[..., None]) / divisor)
    codes = mx.where((steps > 0) & (scales[..., None] != 0), mx.minimum(steps, top), 0).astype(mx.uint8)
    return pack_codes(codes.reshape(values.shape), fmt.code_bits), scales, biases


def dequantize(words: mx.array, scales: mx.array, biases: mx.array, fmt: CacheFormat) -> mx.array:
    """float32 values of what `quantize` gave; MLX's packing is the cache's, so MLX unpacks it."""
    return mx.dequantize(
        words, scales.astype(mx.float32), biases.astype(mx.float32), group_size=fmt.group, bits=fmt.code_bits
    )
