"""Affine codes of K and V on MLX, step by step as `quant.affine` defines them, so that the bytes agree."""

import mlx.core as mx

from kvrelay_kernels.quant import CacheFormat


def quantize(values: mx.array, fmt: CacheFormat) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and biases of `[..., head_dim]` values."""
    groups = values.astype(mx.float32).reshape(*values.shape[:-1], -1, fmt.group)
    top = float(2**fmt.bits - 1)
    low, high = groups.min(-1), groups.max(-1)
    scales, biases = ((high - low) / top).astype(mx.float16), low.astype(mx.float16)
    divisor = mx.where(scales == 0, 1.0, scales.astype(mx.float32))[..., None]
    codes = mx.clip(mx.round((groups - biases.astype(mx.float32)[..., None]) / divisor), 0, top)
    codes = mx.where(scales[..., None] == 0, 0.0, codes).astype(mx.uint8).reshape(values.shape)
    return pack_codes(codes, fmt.bits), scales, biases


def pack_codes(codes: mx.array, bits: int) -> mx.array:
    """`[..., n]` uint8 codes to `[..., n * bits / 32]` words, code i at bit i * bits."""
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return mx.contiguous(codes).view(mx.uint32)


def dequantize(words: mx.array, scales: mx.array, biases: mx.array, fmt: CacheFormat) -> mx.array:
    """float32 values of what `quantize` gave; MLX's packing is the cache's, so MLX unpacks it."""
    return mx.dequantize(
        words, scales.astype(mx.float32), biases.astype(mx.float32), group_size=fmt.group, bits=fmt.bits
    )
