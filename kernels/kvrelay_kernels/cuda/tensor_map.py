"""What the bulk copy engine has to know of an arena or a matrix, from the driver through ctypes."""

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np

from kvrelay_kernels.cuda.driver import driver_library
from kvrelay_kernels.errors import KernelError

ROW_BYTES = 128
"""An arena is a matrix of such rows; each box has as many as a tile of codes fills."""

OLDEST_CAPABILITY = 90
"""Compute capability times ten. Earlier classes have no bulk copy engine; kernels use `cp.async` there."""
MAP_BYTES = 128
MATRICES = 4096
"""Whose maps are kept."""

_UINT8, _UINT16, _UINT64, _NO_INTERLEAVE, _ZERO_FILL = 0, 1, 4, 0, 0
_PROMOTE_128B, _PROMOTE_256B = 2, 3
"""What the second-level cache asks for at once: no more than a box has in a row (docs/kernels.md)."""
_NOT_SWIZZLED, _SWIZZLE_128B = 0, 3


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
    sizes = (head_dim, tokens, kv_heads, blocks)
    return _encode(_UINT16, address, sizes, strides, box, _PROMOTE_256B)  # the next box has the other half


def matrix_map(matrix: Any, box_rows: int) -> np.void:
    """A tensor map, itself a kernel's parameter, of a matrix in boxes of `box_rows` rows by 64 columns.

    Args:
        matrix: `[rows, columns]` of 16 bits on the device; columns are a multiple of 8. Outside of it, boxes
            are zeros.
        box_rows: at most 256, and may be more than there are.

    Raises:
        KernelError: the driver refused; the message holds its code.
    """
    rows, columns = matrix.shape
    return _matrix_map(matrix.data.ptr, rows, columns, box_rows)


def planes_map(array: Any, box: tuple[int, int], parts: int = 1) -> np.void:
    """A tensor map, itself a kernel's parameter, of bytes in three dimensions, not swizzled.

    Args:
        array: `[planes, rows, ...]` on the device; what lies behind is at most 2048 bytes, and a multiple of
            16. Outside of it, boxes are zeros.
        box: its planes and rows, at most 256 each.
        parts: of what lies behind; a box has one of them, a multiple of 16 bytes.

    Raises:
        KernelError: the driver refused; the message holds its code.
    """
    planes, rows = array.shape[:2]
    return _planes_map(array.data.ptr, planes, rows, array.nbytes // (planes * rows), box, parts)


@lru_cache(MATRICES)
def _planes_map(
    address: int, planes: int, rows: int, width: int, box: tuple[int, int], parts: int
) -> np.void:
    sizes, strides = (width // 8, rows, planes), (width, width * rows)
    whole = (width // (8 * parts), box[1], box[0])
    return np.void(_describe(_UINT64, address, sizes, strides, whole, _NOT_SWIZZLED))


@lru_cache(MATRICES)
def _matrix_map(address: int, rows: int, columns: int, box_rows: int) -> np.void:
    box = (ROW_BYTES // 2, box_rows)
    sizes, strides = (columns, rows), (2 * columns,)
    return np.void(_describe(_UINT16, address, sizes, strides, box))


def _encode(
    kind: int,
    address: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    promotion: int = _PROMOTE_128B,
) -> Any:
    """A map on the device; zeros where there is no copy engine, and no kernel that reads this."""
    import cupy  # pyright: ignore[reportMissingImports]

    if int(cupy.cuda.Device().compute_capability) < OLDEST_CAPABILITY:
        return cupy.zeros(MAP_BYTES, np.uint8)
    described = _describe(kind, address, sizes, strides, box, promotion=promotion)
    return cupy.asarray(np.frombuffer(described, np.uint8))


def _describe(
    kind: int,
    address: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int = _SWIZZLE_128B,
    promotion: int = _PROMOTE_128B,
) -> bytes:
    """Have the driver describe an array; `promotion`: what the second-level cache asks for at once.

    Source: CUDA driver API, tensor map object management.
    """
    space = (ctypes.c_uint8 * 192)()
    place = -(-ctypes.addressof(space) // 64) * 64  # the driver wants 64-byte alignment
    rank = len(sizes)
    code = driver_library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(place),
        ctypes.c_int(kind),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        ctypes.c_int(_NO_INTERLEAVE),
        ctypes.c_int(swizzle),
        ctypes.c_int(promotion),
        ctypes.c_int(_ZERO_FILL),
    )
    if code:
        raise KernelError(f"cuTensorMapEncodeTiled failed with {code} for {sizes} at {address:#x}")
    return ctypes.string_at(place, MAP_BYTES)
