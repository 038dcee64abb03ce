"""What the bulk copy engine has to know of an arena, from the driver through ctypes."""

import ctypes
from functools import cache
from typing import Any

import numpy as np

from kvrelay_kernels.errors import BackendUnavailable, KernelError

ROW_BYTES = 128
"""An arena is a matrix of such rows; each box has as many as a tile of codes fills."""

OLDEST_CAPABILITY = 90
"""Compute capability times ten. Earlier classes have no bulk copy engine; kernels use `cp.async` there."""
MAP_BYTES = 128

_UINT8, _UINT16, _NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_256B, _ZERO_FILL = 0, 1, 0, 3, 3, 0


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendUnavailable(f"NVIDIA's driver is missing: {error}") from error


def tensor_map(address: int, nbytes: int, box_rows: int) -> Any:
    """A tensor map on the device (`[128]` uint8) of `nbytes` bytes at `address`, in boxes of `box_rows` rows.

    Raises:
        KernelError: the driver refused; the message holds its code.
    """
    return _encode(_UINT8, address, (ROW_BYTES, nbytes // ROW_BYTES), (ROW_BYTES,), (ROW_BYTES, box_rows))


def block_map(address: int, blocks: int, block_bytes: int, shape: tuple[int, int, int]) -> Any:
    """A tensor map on the device of 16-bit blocks at `address`, in boxes of 64 elements of every token.

    Args:
        address: of the first block's keys, or of its values.
        blocks: how many there are; outside of them boxes are zeros.
        block_bytes: from one block to the next.
        shape: `(kv_heads, tokens, head_dim)` of a block.

    Raises:
        KernelError: the driver refused; the message holds its code.
    """
    kv_heads, tokens, head_dim = shape
    strides = (2 * head_dim, 2 * head_dim * tokens, block_bytes)
    box = (ROW_BYTES // 2, tokens, 1, 1)
    return _encode(_UINT16, address, (head_dim, tokens, kv_heads, blocks), strides, box)


def _encode(
    kind: int, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> Any:
    """Have the driver describe an array; zeros where there is no copy engine, and no kernel that reads this.

    Source: CUDA driver API, tensor map object management.
    """
    import cupy  # pyright: ignore[reportMissingImports]

    if int(cupy.cuda.Device().compute_capability) < OLDEST_CAPABILITY:
        return cupy.zeros(MAP_BYTES, np.uint8)
    space = (ctypes.c_uint8 * 192)()
    place = -(-ctypes.addressof(space) // 64) * 64  # the driver wants 64-byte alignment
    rank = len(sizes)
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(place),
        ctypes.c_int(kind),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        ctypes.c_int(_NO_INTERLEAVE),
        ctypes.c_int(_SWIZZLE_128B),
        ctypes.c_int(_PROMOTE_256B),
        ctypes.c_int(_ZERO_FILL),
    )
    if code:
        raise KernelError(f"cuTensorMapEncodeTiled failed with {code} for {sizes} at {address:#x}")
    return cupy.asarray(np.frombuffer(ctypes.string_at(place, MAP_BYTES), np.uint8))
