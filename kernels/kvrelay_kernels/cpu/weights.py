"""Weights as the CPU's products read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cpu.integers import COLUMNS, LEAST
from kvrelay_kernels.cpu.tiles import PANEL
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import HostWeight, WeightMode
from kvrelay_kernels.quant.weights import MODE_BITS, AffineWeight, as_codes, concatenate

CACHE_LINE = 64


@dataclass(frozen=True)
class PackedLinear:
    """A matrix `[rows, columns]` in panels of `PANEL` rows, an even number of them, zeros below the last row.

    `codes` is `[panels, columns, PANEL]` float32. Of codes of 4 or 8 bits it is uint16, `[panels,
    columns * bits / 32, PANEL, 2]`: pairs of words, whose lowest codes are neighbouring columns, the next
    ones the next two, and so on. `affine` is `[panels, columns / group, 2, PANEL]`: scales, then biases,
    float32 or, where that loses nothing, float16 seen as uint16.
    """

    rows: int
    columns: int
    bits: int
    group: int
    codes: NDArray[Any]
    affine: NDArray[Any]
    bias: NDArray[np.float32] | None

    @property
    def width(self) -> int:
        """Rows of the matrix with the padding below them."""
        return self.codes.shape[0] * PANEL

    @property
    def segment(self) -> int:
        """Columns whose products are summed as integers: a group, or a part of one."""
        return gcd(self.group, COLUMNS)

    @property
    def half(self) -> bool:
        """Whether scales and biases are float16."""
        return self.affine.dtype == np.uint16

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.affine.nbytes


def aligned(shape: tuple[int, ...], dtype: Any, zero: bool = False) -> NDArray[Any]:
    """An array that starts on a cache line; pages are not touched before they are used."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = (np.zeros if zero else np.empty)(nbytes + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _panels(rows: NDArray[Any], panels: int) -> NDArray[Any]:
    """`[rows, n, ...]` as `[panels, n, PANEL, ...]`, zeros below the last row."""
    packed = aligned((panels, rows.shape[1], PANEL, *rows.shape[2:]), rows.dtype, zero=True)
    full = len(rows) // PANEL
    packed[:full] = rows[: full * PANEL].reshape(full, PANEL, *rows.shape[1:]).swapaxes(1, 2)
    if len(rows) % PANEL:
        packed[full, :, : len(rows) % PANEL] = rows[full * PANEL :].swapaxes(0, 1)
    return packed


def _words(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint16]:
    """`[rows, columns]` as words `[rows, columns * bits / 32, 2]`."""
    split = codes.reshape(len(codes), -1, 16 // bits, 2)
    words = np.zeros((*split.shape[:2], 2), np.uint16)
    for number in range(16 // bits):
        words |= split[:, :, number].astype(np.uint16) << np.uint16(bits * number)
    return words


def _pack_affine(weight: AffineWeight, panels: int) -> tuple[NDArray[np.uint16], NDArray[Any]]:
    codes = _panels(_words(weight.codes, weight.bits), panels)
    with np.errstate(over="ignore"):
        fits = all(np.array_equal(a.astype(np.float16), a) for a in (weight.scales, weight.biases))
    kind = np.float16 if fits else np.float32
    affine = aligned((panels, weight.scales.shape[1], 2, PANEL), kind)
    affine[:, :, 0] = _panels(weight.scales.astype(kind), panels)
    affine[:, :, 1] = _panels(weight.biases.astype(kind), panels)
    return codes, affine.view(np.uint16) if fits else affine


def pack_linear(parts: Sequence[HostWeight], mode: WeightMode, bias: NDArray[Any] | None) -> PackedLinear:
    """Pack the parts, rows below each other. Parts of mixed kinds become float32 together, and so do codes in
    groups of columns that integers cannot be summed in.

    Raises:
        FormatUnsupported: codes of an unknown width, or columns that no group divides.
    """
    if mode in MODE_BITS:
        parts = [as_codes(part, MODE_BITS[mode]) for part in parts]
    coded = [part for part in parts if isinstance(part, AffineWeight)]
    columns = parts[0].shape[1]
    rows = sum(part.shape[0] for part in parts)
    panels = -(-rows // (2 * PANEL)) * 2
    whole = concatenate(coded) if mode != "float" and len(coded) == len(parts) else None
    if whole is not None and whole.group % LEAST == 0:
        if not 1 <= whole.bits <= 8:
            raise FormatUnsupported(f"weights of {whole.bits} bits")
        bits, group = 4 if whole.bits <= 4 else 8, whole.group
        codes, affine = _pack_affine(AffineWeight(whole.codes, whole.scales, whole.biases, bits), panels)
    else:
        values = [p.dequantize() if isinstance(p, AffineWeight) else np.asarray(p, np.float32) for p in parts]
        bits, group, affine = 32, columns, np.zeros(1, np.float32)
        codes = _panels(np.concatenate(values), panels)
    offsets = None if bias is None else np.ascontiguousarray(bias, np.float32)
    return PackedLinear(rows, columns, bits, group, codes, affine, offsets)
