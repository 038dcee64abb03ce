"""Scales as they are stored: float16, or a byte with an exponent (e8m0) or a small float (e4m3).

A scale that is NaN, or too large because something in the group was infinite, stays visible: it decodes to
NaN or infinity, and so does all of its group.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.quant.levels import decode_e4m3, encode_e4m3

ScaleType = Literal["float16", "e8m0", "e4m3"]

E8M0_ROUND = 0x7FFFFF
"""What carries into the exponent of every float32 that is no power of two."""
E8M0_ONE = 127
E8M0_NAN = 255
E4M3_NAN = 0x7F


def encode(sizes: NDArray[np.float32], kind: ScaleType) -> NDArray[Any]:
    """Sizes that are not negative, as they are stored: float16 or uint8."""
    if kind == "float16":
        with np.errstate(over="ignore"):
            return sizes.astype(np.float16)
    if kind == "e4m3":
        return np.where(np.isfinite(sizes), encode_e4m3(sizes), np.uint8(E4M3_NAN))
    # The next power of two, so that nothing is cut off; a group of zeros has the scale 1, as in MLX.
    codes = (sizes.view(np.int32) + E8M0_ROUND) >> 23
    broken = ~np.isfinite(sizes)
    return np.where(sizes == 0, E8M0_ONE, np.where(broken, E8M0_NAN, codes)).astype(np.uint8)


def decode(stored: NDArray[Any], kind: ScaleType) -> NDArray[np.float32]:
    """The sizes that are stored."""
    if kind == "float16":
        return stored.astype(np.float32)
    if kind == "e4m3":
        return np.where(stored == E4M3_NAN, np.float32(np.nan), decode_e4m3(stored))
    sizes = np.ldexp(np.float32(1), np.where(stored == E8M0_NAN, 0, stored.astype(np.int32) - 127))
    return np.where(stored == E8M0_NAN, np.float32(np.nan), sizes)
