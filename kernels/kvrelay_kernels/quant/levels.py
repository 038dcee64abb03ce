"""The numbers that codes stand for where they are not steps: two small floats, and two codebooks.

A code is a sign above the index of a magnitude, so that these tables hold all.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Levels = Literal["e4m3", "e2m1", "normal16", "normal8"]

MAGNITUDES: dict[Levels, tuple[float, ...]] = {
    "e2m1": (0, 0.5, 1, 1.5, 2, 3, 4, 6),
    "normal16": (0.12840, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259),
    "normal8": (0.24509, 0.75601, 1.34391, 2.15195),
}
"""Sorted. The codebooks are the ones of least square error on a standard normal (Max, 1960; Lloyd, 1982)."""

E4M3_MAX = 448.0
E4M3_SMALLEST_EXPONENT = -6


def magnitudes_of(levels: Levels) -> NDArray[np.float32]:
    """Magnitudes by index, rounded to float16: what every backend, and a tensor core, holds exactly."""
    return np.array(MAGNITUDES[levels], np.float16).astype(np.float32)


def edges_of(levels: Levels) -> NDArray[np.float32]:
    """Half-way points between neighbouring magnitudes, exact in float32. On edge i the even code wins: i if
    i is even, else i + 1.
    """
    magnitudes = magnitudes_of(levels)
    return (magnitudes[:-1] + magnitudes[1:]) / np.float32(2)


def largest(levels: Levels) -> float:
    """The largest number that a code stands for."""
    return E4M3_MAX if levels == "e4m3" else float(magnitudes_of(levels)[-1])


def encode(values: NDArray[np.float32], levels: Levels) -> NDArray[np.uint8]:
    """Codes of the nearest numbers. What is larger than all becomes the largest; NaN becomes code 0."""
    return encode_e4m3(values) if levels == "e4m3" else _encode_signed(values, levels)


def decode(codes: NDArray[np.uint8], levels: Levels) -> NDArray[np.float32]:
    """The numbers that codes stand for."""
    if levels == "e4m3":
        return decode_e4m3(codes)
    magnitudes = magnitudes_of(levels)
    return np.concatenate([magnitudes, -magnitudes])[codes]


def encode_e4m3(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """8-bit floats without infinity: sign, 4 bits of exponent, 3 of mantissa; halves go to even.

    From https://arxiv.org/abs/2209.05433. The code of NaN, 0x7f, is not produced here.
    """
    size = np.minimum(np.abs(values), np.float32(E4M3_MAX))
    size = np.where(np.isnan(size), np.float32(0), size)
    exponent = np.maximum((size.view(np.int32) >> 23) - 127, E4M3_SMALLEST_EXPONENT)
    step = ((exponent + (127 - 3)) << 23).view(np.float32)
    rounded = np.rint(size / step) * step
    # A float16 has one more bit of exponent and seven more of mantissa: all of its numbers, times 2^8.
    codes = ((rounded / np.float32(256)).astype(np.float16).view(np.uint16) >> 7).astype(np.uint8)
    negative = np.signbit(values) & ~np.isnan(values)
    return codes | (negative.astype(np.uint8) * np.uint8(0x80))


def decode_e4m3(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The numbers of `encode_e4m3`."""
    wide = codes.astype(np.uint16)
    halves = ((wide & 0x7F) << 7 | (wide & 0x80) << 8).view(np.float16)
    return halves.astype(np.float32) * np.float32(256)


def _encode_signed(values: NDArray[np.float32], levels: Levels) -> NDArray[np.uint8]:
    size: NDArray[Any] = np.abs(values)
    index = np.zeros(values.shape, np.uint8)
    for number, edge in enumerate(edges_of(levels)):
        index += size >= edge if number % 2 else size > edge
    magnitudes = magnitudes_of(levels)
    negative = (values < 0) & (magnitudes[index] > 0)  # zero has one code
    return index | (negative.astype(np.uint8) * np.uint8(len(magnitudes)))
