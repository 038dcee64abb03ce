"""Codes as bits of 32-bit words, on MLX; see `quant.packing`."""

import mlx.core as mx

UNPACKED_TOGETHER = 32


def pack_codes(codes: mx.array, bits: int) -> mx.array:
    """`[..., n]` uint8 codes to `[..., n * bits / 32]` words, code i at bit i * bits."""
    if bits in (3, 6):
        ones = (codes[..., None] >> mx.arange(bits, dtype=mx.uint8)) & 1
        words = ones.reshape(*codes.shape[:-1], -1, 32).astype(mx.uint32)
        return (words << mx.arange(32, dtype=mx.uint32)).sum(-1)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return mx.contiguous(codes).view(mx.uint32)


def unpack_codes(words: mx.array, bits: int) -> mx.array:
    """`[..., n]` uint8 codes of what `pack_codes` gave: steps of one above nothing, to MLX."""
    groups = words.shape[-1] * 32 // bits // UNPACKED_TOGETHER
    ones = mx.ones((*words.shape[:-1], groups), mx.float32)
    codes = mx.dequantize(words, ones, mx.zeros_like(ones), group_size=UNPACKED_TOGETHER, bits=bits)
    return codes.astype(mx.uint8)
