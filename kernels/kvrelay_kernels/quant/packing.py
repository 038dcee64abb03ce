"""Codes as bits of 32-bit words, as MLX packs them."""

import numpy as np
from numpy.typing import NDArray

WIDTHS = (3, 4, 6, 8)


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Pack `[..., n]` codes into `[..., n * bits / 32]` words: code i at bit i * bits, little-endian.

    Raises ValueError where codes of so many bits are not packed, or do not fill the last word.
    """
    _check(bits)
    if codes.shape[-1] * bits % 32:
        raise ValueError(f"{codes.shape[-1]} codes of {bits} bits do not fill words of 32")
    if bits != 8:
        ones = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
        codes = np.packbits(ones.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    return np.ascontiguousarray(codes).view("<u4")


def unpack_codes(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """The codes that `pack_codes` packed, `[..., n]`. Raises ValueError for other widths."""
    _check(bits)
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets
    ones = np.unpackbits(octets, axis=-1, bitorder="little")
    ones = ones.reshape(*octets.shape[:-1], -1, bits)
    return np.packbits(ones, axis=-1, bitorder="little")[..., 0]


def _check(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"codes have {WIDTHS} bits, not {bits}")
