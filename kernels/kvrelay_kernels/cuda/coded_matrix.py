"""Matrices of 4- and 8-bit codes in the order in which lanes read them (`sources/coded_matrix.cuh`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.quant import AffineWeight, CodedWeight, ScaledWeight
from kvrelay_kernels.quant.weights import concatenate, concatenate_scaled

TILE_ROWS = 16
PAIR_ROWS = 2 * TILE_ROWS
UNIT_COLUMNS = 64
BIAS_UNIT = 2.0**24
"""Of the largest half, in the smallest: what a code in the lowest bits of a half is worth is its inverse."""
LARGEST = 2.0**15
"""That a scale or a bias may be in its unit."""
LEAST_EXPONENT = -100
"""Of a unit: float32 has the numbers below it."""
GROUPS = (16, 32, 64)
BITS = (4, 8)


@dataclass(frozen=True)
class Form:
    """What a kernel is compiled for that reads a matrix."""

    bits: int
    """Of a code; 16: elements, row by row."""
    group: int = UNIT_COLUMNS
    """Columns that share a scale; 0: all of a row."""
    wide: bool = False
    """Scales and biases are float32."""
    floats: bool = False
    """Codes are 8-bit floats (e4m3), each group's with a float32 scale and no bias."""

    @property
    def row_scaled(self) -> bool:
        """Whether sums are multiplied by the scales of rows, and not codes by those of groups."""
        return self.group == 0

    @property
    def constants(self) -> dict[str, int]:
        """Macros of the kernel's source."""
        wide, floats = int(self.wide), int(self.floats)
        return {"BITS": self.bits, "GROUP": self.group, "WIDE_FACTORS": wide, "FLOATS": floats}

    @property
    def factor_words(self) -> int:
        """Words of scales and biases that go with a lane's codes of 16 rows x 64 columns."""
        if self.bits == 16 or self.row_scaled:
            return 0
        return 2 * UNIT_COLUMNS // self.group * (2 if self.wide else 1)


ELEMENTS = Form(16)


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix `[n, k]` of `scale * code + bias`, in NumPy or CuPy; zeros where it fills no tile or unit.

    `codes` is uint8 `[pairs, units, 2, 128 * bits]`: pairs of tiles of 16 rows, units of 64 columns.
    `factors` is `[pairs, units, 2, row % 8, groups of a unit, row / 8, 2]`: scale / unit and bias / unit /
    `BIAS_UNIT`, float16 or float32. So a code, seen as a subnormal half, times its scale plus its bias is in
    a half's range. Of 8-bit floats there are scales only, in float32: their bits are also those of a half,
    below 2. If a row has but one, they are `[n]`, and `group` is 0.
    """

    shape: tuple[int, int]
    bits: int
    group: int
    codes: Any
    factors: Any
    unit: float
    """A power of two."""
    floats: bool = False
    """Whether codes are 8-bit floats."""

    @property
    def form(self) -> Form:
        """What its kernels are compiled for."""
        wide = not self.floats and self.factors.dtype == np.float32
        return Form(self.bits, self.group, wide, self.floats)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.codes.nbytes + self.factors.nbytes)


def gated_order(n: int) -> NDArray[np.intp]:
    """Rows of a gate above its `up`, `n` in all, in the order of a gated matrix: 8 of each by turns.

    So a lane of a matrix instruction, which has rows g and g + 8 of a tile, has a gate with its `up`. Of rows
    that 16 does not divide there is no such order.
    """
    return np.arange(n).reshape(2, -1, TILE_ROWS // 2).swapaxes(0, 1).reshape(n)


def pack_codes(parts: Sequence[CodedWeight], rounded: bool = False, order: Any = None) -> CodedMatrix | None:
    """The parts below each other, at their widest codes and finest group; None where no kernel reads that.

    They are all in affine form, or all 8-bit floats, whose scales stay as they are.
    `order` is that of their rows, where these are; None: as they come.
    Codes of up to 4 bits are kept in 4, others in 8; a group that 64 divides is cut into groups of 64.
    Scales and biases become float16 if that loses nothing, or if they may be `rounded`: then a value moves
    by at most 2^-11 of its scale * code and of its bias, as it would in a matrix of float16 elements, or by
    2^-15 of the matrix's largest scale.
    """
    affine = [part for part in parts if isinstance(part, AffineWeight)]
    scaled = [part for part in parts if isinstance(part, ScaledWeight)]
    whole: Any = concatenate_scaled(scaled) if scaled else concatenate(affine)
    if order is not None:
        whole = whole.rows(order)
    if scaled and whole.scales.shape[1] == 1:
        codes = _in_lanes(whole.codes, 8, UNIT_COLUMNS)
        return CodedMatrix(whole.shape, 8, 0, codes, whole.scales.reshape(-1), 1.0, floats=True)
    if whole.group % UNIT_COLUMNS == 0:
        whole = whole.regroup(UNIT_COLUMNS)
    if whole.group not in GROUPS:
        return None
    if scaled:
        unit = _unit(whole.scales)
        factors = _tiled(whole.scales / np.float32(unit), UNIT_COLUMNS // whole.group).copy(order="C")
        codes = _in_lanes(whole.codes, 8, whole.group)
        return CodedMatrix(whole.shape, 8, whole.group, codes, factors, unit, floats=True)
    if not 1 <= whole.bits <= max(BITS):
        return None
    bits = 4 if whole.bits <= 4 else 8
    unit = _unit(whole.scales, whole.biases)
    pair = (whole.scales / np.float32(unit), whole.biases / np.float32(unit * BIAS_UNIT))
    factors = np.stack([_tiled(part, UNIT_COLUMNS // whole.group) for part in pair], axis=-1)
    halves = factors.astype(np.float16)
    if rounded or bool((halves.astype(np.float32) == factors).all()):
        factors = halves
    codes = _in_lanes(whole.codes, bits, whole.group)
    return CodedMatrix(whole.shape, bits, whole.group, codes, factors.copy(order="C"), unit)


def _unit(scales: Any, biases: Any = 0.0) -> float:
    """The least power of two in which no scale or bias is larger than `LARGEST`."""
    scale, bias = (float(np.max(abs(part))) for part in (scales, biases))
    largest = max(scale, bias / BIAS_UNIT, LARGEST * 2.0**LEAST_EXPONENT)
    if not math.isfinite(scale + bias):
        return 1.0
    return 2.0 ** math.ceil(math.log2(largest / LARGEST))


def _padded(values: Any, rows: int, columns: int) -> Any:
    """`[n, m]` with zeros up to multiples of `rows` and `columns`."""
    n, m = values.shape
    whole = np.zeros_like(values, shape=(-(-n // rows) * rows, -(-m // columns) * columns))
    whole[:n, :m] = values
    return whole


def _tiled(factors: Any, groups: int) -> Any:
    """`[n, k / group]` as `[pairs, units, 2, row % 8, groups, row / 8]`."""
    whole = _padded(factors, PAIR_ROWS, groups)
    parts = whole.reshape(len(whole) // PAIR_ROWS, 2, 2, 8, -1, groups)
    return parts.transpose(0, 4, 1, 3, 5, 2)


def _in_lanes(codes: Any, bits: int, group: int) -> Any:
    """`[n, k]` as `[pairs, units, 2, bytes]`, each lane's words 16 bytes at a time.

    Lane 4 g + t has rows g and g + 8. Its four columns of a step lie at bits 0, 16, 8 and 24 of a word: two
    and two are neighbours in operands. With 4 bits the lower row is in the upper half of each byte; with 8
    bits a step has a word for each row.
    """
    whole = _padded(codes, PAIR_ROWS, UNIT_COLUMNS)
    tiles, units = len(whole) // TILE_ROWS, whole.shape[1] // UNIT_COLUMNS
    if group == 16:
        parts = whole.reshape(tiles, 2, 8, units, 4, 4, 2, 2)  # step, t, pair, column
        parts = parts.transpose(0, 3, 2, 5, 4, 1, 7, 6)
    else:
        parts = whole.reshape(tiles, 2, 8, units, 2, 4, 2, 2, 2)  # step / 2, t, step % 2, pair, column
        parts = parts.transpose(0, 3, 2, 5, 4, 6, 1, 8, 7)
    parts = parts.reshape(tiles, units, 32, 4, 2, 4)  # lane, step, row / 8, byte
    if bits == 4:
        packed = parts[..., 0, :] | parts[..., 1, :] << 4
    else:
        packed = parts.reshape(tiles, units, 32, 2, 16).transpose(0, 1, 3, 2, 4)
    return packed.reshape(tiles // 2, 2, units, -1).transpose(0, 2, 1, 3).copy(order="C")
