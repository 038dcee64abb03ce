"""Weights as the CPU's products read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cpu.codes import E4M3_UNIT
from kvrelay_kernels.cpu.integers import COLUMNS, LEAST
from kvrelay_kernels.cpu.small_floats import GROUP
from kvrelay_kernels.cpu.tiles import PANEL
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import HostWeight, WeightMode
from kvrelay_kernels.quant.weights import (
    AffineWeight,
    ScaledWeight,
    as_floats,
    concatenate,
    concatenate_scaled,
    in_mode,
)

CACHE_LINE = 64


@dataclass(frozen=True)
class PackedLinear:
    """A matrix `[rows, columns]` in panels of `PANEL` rows, an even number of them, zeros below the last row.

    `codes` is `[panels, columns, PANEL]` float32. Of codes of 4 or 8 bits it is uint16, `[panels,
    columns * bits / 32, PANEL, 2]`: pairs of words, whose lowest codes are neighbouring columns, the next
    ones the next two, and so on. `affine` is `[panels, columns / group, 2, PANEL]`: scales, then biases,
    float32 or, where that loses nothing, float16 seen as uint16.

    8-bit floats are uint8, `[panels, columns, PANEL]`, and there are scales alone, float32 `[panels, groups,
    PANEL]`, `E4M3_UNIT` times as large; the last group may be short.
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
    def floats(self) -> bool:
        """Whether it is a matrix of 8-bit floats."""
        return self.codes.dtype == np.uint8

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


def _at_most(columns: int, weight: ScaledWeight) -> ScaledWeight:
    """The weight with groups of no more columns."""
    if weight.group <= columns:
        return weight
    return weight.regroup(columns if weight.scales.shape[1] == 1 else gcd(weight.group, columns))


def pack_linear(parts: Sequence[HostWeight], mode: WeightMode, bias: NDArray[Any] | None) -> PackedLinear:
    """Pack the parts, rows below each other. Parts of mixed kinds become float32 together, and so do codes in
    groups of columns that integers cannot be summed in.

    Raises:
        FormatUnsupported: codes of an unknown width, or columns that no group divides.
    """
    parts = [in_mode(part, mode) for part in parts]
    coded = [part for part in parts if isinstance(part, AffineWeight)]
    columns = parts[0].shape[1]
    rows = sum(part.shape[0] for part in parts)
    panels = -(-rows // (2 * PANEL)) * 2
    offsets = None if bias is None else np.ascontiguousarray(bias, np.float32)
    scaled = [part for part in parts if isinstance(part, ScaledWeight)]
    if len(scaled) == len(parts):
        small = _at_most(GROUP, concatenate_scaled(scaled))
        scales = _panels(small.scales * np.float32(E4M3_UNIT), panels)
        return PackedLinear(rows, columns, 8, small.group, _panels(small.codes, panels), scales, offsets)
    whole = concatenate(coded) if len(coded) == len(parts) else None
    if whole is not None and whole.group % LEAST == 0:
        if not 1 <= whole.bits <= 8:
            raise FormatUnsupported(f"weights of {whole.bits} bits")
        bits, group = 4 if whole.bits <= 4 else 8, whole.group
        codes, affine = _pack_affine(AffineWeight(whole.codes, whole.scales, whole.biases, bits), panels)
    else:
        values = [as_floats(part) for part in parts]
        bits, group, affine = 32, columns, np.zeros(1, np.float32)
        codes = _panels(np.concatenate(values), panels)
    return PackedLinear(rows, columns, bits, group, codes, affine, offsets)
