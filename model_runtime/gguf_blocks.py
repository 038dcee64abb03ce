"""GGUF's tensor types, unpacked without loss: floats as they are, blocks of codes to AffineWeight.

Block layouts: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h. Every product
and sum of a scale and a code is exact in float32, or rounded just as ggml's own dequantizer rounds it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.interface import HostWeight
from kvrelay_kernels.quant import AffineWeight

Bytes = NDArray[np.uint8]
Affine = tuple[Bytes, NDArray[np.float32], NDArray[np.float32]]
"""Codes `[blocks, elements]`, scales and biases `[blocks, groups]`."""


@dataclass(frozen=True)
class BlockType:
    """A tensor type: blocks of `elements` values in `nbytes` bytes."""

    name: str
    elements: int
    nbytes: int
    unpack: Callable[[Bytes, tuple[int, ...]], HostWeight]
    """From raw bytes and shape `[..., columns]`."""


def _floats(dtype: Any) -> Callable[[Bytes, tuple[int, ...]], HostWeight]:
    return lambda raw, shape: raw.view(dtype).reshape(shape)


def _affine(
    bits: int, nbytes: int, split: Callable[[Bytes], Affine]
) -> Callable[[Bytes, tuple[int, ...]], HostWeight]:
    def unpack(raw: Bytes, shape: tuple[int, ...]) -> HostWeight:
        codes, scales, biases = split(raw.reshape(-1, nbytes))
        rows = int(np.prod(shape[:-1]))
        return AffineWeight(codes.reshape(rows, -1), scales.reshape(rows, -1), biases.reshape(rows, -1), bits)

    return unpack


def _half(blocks: Bytes, at: int) -> NDArray[np.float32]:
    """The float16 at byte `at` of each block, `[blocks, 1]`."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """`[..., n]` bytes to `[..., 2n]` codes: all low halves, then all high halves."""
    width = packed.shape[-1]
    codes = np.empty((*packed.shape[:-1], 2 * width), np.uint8)
    np.bitwise_and(packed, 15, out=codes[..., :width])
    np.right_shift(packed, 4, out=codes[..., width:])
    return codes


def _q4_0(blocks: Bytes) -> Affine:
    scale = _half(blocks, 0)
    return _nibbles(blocks[:, 2:]), scale, scale * np.float32(-8)


def _q4_1(blocks: Bytes) -> Affine:
    return _nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Affine:
    scale = _half(blocks, 0)
    codes = _nibbles(blocks[:, 6:])
    codes |= np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little") << 4
    return codes, scale, scale * np.float32(-16)


def _q8_0(blocks: Bytes) -> Affine:
    scale = _half(blocks, 0)
    # Flipping the top bit of a signed byte adds 128.
    return blocks[:, 2:] ^ np.uint8(128), scale, scale * np.float32(-128)


def _q4_k(blocks: Bytes) -> Affine:
    low, high, mixed = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, (mixed & 15) | ((low >> 2) & 48)], axis=1)
    minima = np.concatenate([high & 63, (mixed >> 4) | ((high >> 2) & 48)], axis=1)
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 256)
    return codes, _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _q6_k(blocks: Bytes) -> Affine:
    codes = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 32)
    for quarter in range(4):
        codes[:, :, quarter] |= ((high >> np.uint8(2 * quarter)) & 3) << 4
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return codes.reshape(-1, 256), scales, scales * np.float32(-32)


BLOCK_TYPES: Mapping[int, BlockType] = {
    0: BlockType("F32", 1, 4, _floats(np.float32)),
    1: BlockType("F16", 1, 2, _floats(np.float16)),
    2: BlockType("Q4_0", 32, 18, _affine(4, 18, _q4_0)),
    3: BlockType("Q4_1", 32, 20, _affine(4, 20, _q4_1)),
    6: BlockType("Q5_0", 32, 22, _affine(8, 22, _q5_0)),
    8: BlockType("Q8_0", 32, 34, _affine(8, 34, _q8_0)),
    12: BlockType("Q4_K", 256, 144, _affine(4, 144, _q4_k)),
    14: BlockType("Q6_K", 256, 210, _affine(8, 210, _q6_k)),
    30: BlockType("BF16", 1, 2, _floats(ml_dtypes.bfloat16)),
}
"""By the number that stands in the file."""
