"""What the bulk copy engine has to know of an arena, from the driver through ctypes."""

import ctypes
from functools import cache
from typing import Any

import numpy as np

from kvrelay_kernels.errors import BackendUnavailable, KernelError

ROW_BYTES = 128
"""An arena is a matrix of such rows; each box has as many as a tile of codes fills."""

_UINT8, _NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_256B, _ZERO_FILL = 0, 0, 3, 3, 0


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendUnavailable(f"NVIDIA's driver is missing: {error}") from error


def tensor_map(address: int, nbytes: int, box_rows: int) -> Any:
    """A tensor map on the device (`[128]` uint8) of `nbytes` bytes at `address`, in boxes of `box_rows` rows.

    Source: CUDA driver API, tensor map object management.

    Raises:
        KernelError: the driver refused; the message holds its code.
    """
    import cupy  # pyright: ignore[reportMissingImports]

    space = (ctypes.c_uint8 * 192)()
    place = -(-ctypes.addressof(space) // 64) * 64  # the driver wants 64-byte alignment
    rows = nbytes // ROW_BYTES
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(place),
        ctypes.c_int(_UINT8),
        ctypes.c_uint32(2),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(ROW_BYTES, rows),
        (ctypes.c_uint64 * 1)(ROW_BYTES),
        (ctypes.c_uint32 * 2)(ROW_BYTES, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        ctypes.c_int(_NO_INTERLEAVE),
        ctypes.c_int(_SWIZZLE_128B),
        ctypes.c_int(_PROMOTE_256B),
        ctypes.c_int(_ZERO_FILL),
    )
    if code:
        raise KernelError(f"cuTensorMapEncodeTiled failed with {code} for {nbytes} bytes at {address:#x}")
    return cupy.asarray(np.frombuffer(ctypes.string_at(place, 128), np.uint8))
