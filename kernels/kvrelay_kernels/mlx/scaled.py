"""Scaled numbers on MLX, step by step as `quant.scaled` defines them, so that the bytes agree.

`mlx.core.quantize` gives these bytes on the CPU, but silences NaN and infinity, and on GPUs keeps a sign on
codes of zero.
"""

import mlx.core as mx

from kvrelay_kernels.mlx.packing import pack_codes, unpack_codes
from kvrelay_kernels.quant import CacheFormat
from kvrelay_kernels.quant.levels import Levels, edges_of, largest, magnitudes_of
from kvrelay_kernels.quant.scales import E4M3_NAN, E8M0_NAN, E8M0_ONE, E8M0_ROUND, ScaleType

NAN_SCALES: dict[ScaleType, int] = {"e8m0": E8M0_NAN, "e4m3": E4M3_NAN}


def quantize(values: mx.array, fmt: CacheFormat) -> tuple[mx.array, mx.array]:
    """Codes and scales of `[..., head_dim]` values."""
    table, kind = _levels(fmt), fmt.scheme.scales
    groups = values.astype(mx.float32).reshape(*values.shape[:-1], -1, fmt.group)
    stored = _scales(groups, fmt)
    divisor = _stored(stored, kind)
    quotients = groups / mx.where(divisor == 0, 1.0, divisor)[..., None]
    if table == "e4m3":
        codes = mx.where(mx.isnan(quotients), 0, mx.to_fp8(quotients)).astype(mx.uint8)
    else:
        codes = _nearest(quotients, table)
    return pack_codes(codes.reshape(values.shape), fmt.code_bits), stored


def dequantize(words: mx.array, stored: mx.array, fmt: CacheFormat) -> mx.array:
    """float32 values of what `quantize` gave; by MLX, where it knows the format."""
    kind = fmt.scheme.scales
    if kind == "float16":
        magnitudes = mx.array(magnitudes_of(_levels(fmt)))
        numbers = mx.concatenate([magnitudes, -magnitudes])[unpack_codes(words, fmt.code_bits)]
        groups = numbers.reshape(*numbers.shape[:-1], -1, fmt.group) * stored.astype(mx.float32)[..., None]
        return groups.reshape(numbers.shape)
    values = mx.dequantize(
        words, stored, group_size=fmt.group, bits=fmt.code_bits, mode=fmt.base, dtype=mx.float32
    )
    groups = values.reshape(*values.shape[:-1], -1, fmt.group)
    return mx.where((stored == NAN_SCALES[kind])[..., None], mx.nan, groups).reshape(values.shape)


def _scales(groups: mx.array, fmt: CacheFormat) -> mx.array:
    """As they are stored, of `[..., groups, group]` values."""
    if fmt.rotates_values:
        squares = mx.square(groups)
        while squares.shape[-1] > 1:
            low, high = mx.split(squares, 2, -1)
            squares = low + high
        return mx.sqrt(squares[..., 0] * (1 / fmt.group)).astype(mx.float16)
    kind = fmt.scheme.scales
    broken = mx.logical_not(mx.isfinite(groups)).any(-1)
    sizes = mx.where(broken, 0.0, mx.abs(groups).max(-1) / largest(_levels(fmt)))
    if kind == "e4m3":
        codes = mx.to_fp8(sizes)
    else:
        codes = (sizes.view(mx.int32) + E8M0_ROUND) >> 23
        codes = mx.where(sizes == 0, E8M0_ONE, codes)
    return mx.where(broken, NAN_SCALES[kind], codes).astype(mx.uint8)


def _stored(stored: mx.array, kind: ScaleType) -> mx.array:
    """The sizes that are stored, float32."""
    if kind == "float16":
        return stored.astype(mx.float32)
    if kind == "e4m3":
        sizes = mx.from_fp8(stored, dtype=mx.float32)
    else:
        sizes = (
            mx.where(stored == 0, 1 << 22, stored.astype(mx.int32) << 23).astype(mx.int32).view(mx.float32)
        )
    return mx.where(stored == NAN_SCALES[kind], mx.nan, sizes)


def _nearest(x: mx.array, table: Levels) -> mx.array:
    """As `quant.levels.encode` for tables of magnitudes."""
    size, index = mx.abs(x), mx.zeros(x.shape, mx.uint8)
    for number, edge in enumerate(edges_of(table).tolist()):
        index = index + (size >= edge if number % 2 else size > edge).astype(mx.uint8)
    magnitudes = magnitudes_of(table)
    negative = (x < 0) & (mx.array(magnitudes)[index] > 0)
    return index + negative.astype(mx.uint8) * len(magnitudes)


def _levels(fmt: CacheFormat) -> Levels:
    if fmt.scheme.levels is None:
        raise ValueError("codes of this format are steps above a bias: see affine.py")
    return fmt.scheme.levels
