"""Products of coded weights: rows of activations are rounded to `integers`, and multiplied panel by panel."""

from functools import cache as once
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kvrelay_kernels.cpu.integers import (
    COLUMNS,
    LEAST,
    LINE,
    RECORD,
    ROWS,
    code_product,
    round_record,
    widen_words,
)
from kvrelay_kernels.cpu.program import (
    Operation,
    address,
    floats,
    halves,
    longs,
    octets,
    operation,
    task_code,
)
from kvrelay_kernels.cpu.tiles import PANEL
from kvrelay_kernels.cpu.vector import host_registers

TILE_ROWS = 8 if host_registers()[0] == 16 else 2
"""Rows whose sums fit in registers beside a panel's codes."""
FEW = 64
"""Up to so many rows, a tile takes a panel's codes apart itself; above, that is done once for all of them."""
DEPTH = 384
"""Columns taken apart at once, at most: 24 KiB, which stay in the first-level cache."""
CHUNK = 2048
"""Elements of a task that rounds rows."""


def new_records(rows: int, columns: int) -> NDArray[np.uint8]:
    """Memory for so many rounded rows."""
    return np.empty(-(-columns // COLUMNS) * rows * RECORD, np.uint8)


@njit(nogil=True, inline="always")
def _first_record(row: int, rows: int, groups: int) -> tuple[int, int]:
    """Where the records of a row of `rows` begin, `groups` of them, and how far apart they are."""
    first = row // ROWS * ROWS
    return first * groups + row - first, min(ROWS, rows - first)


@njit(nogil=True, cache=True)
def round_columns(
    x: Any, start: int, begin: int, end: int, out: Any, row: int, rows: int, columns: int
) -> None:
    """Columns `begin` to `end` of row `row` of `rows`, which starts at item `start` of x, as records.

    `begin` is a multiple of 32, and so is `end`, unless the row ends there: then of 16.
    """
    record, apart = _first_record(row, rows, -(-columns // COLUMNS))
    column = begin
    while column + COLUMNS <= end:
        round_record(x, start + column, out, record + column // COLUMNS * apart, COLUMNS)
        column += COLUMNS
    if column < end:
        round_record(x, start + column, out, record + column // COLUMNS * apart, LEAST)


@once
def round_rows_code() -> Any:
    """x, records, rows, columns, rows of a task."""

    def round_rows(at: int, task: int) -> None:
        a = longs(at)
        x, out, rows, columns = floats(a[0]), octets(a[1]), a[2], a[3]
        for row in range(task * a[4], min(rows, (task + 1) * a[4])):
            round_columns(x, row * columns, 0, columns, out, row, rows, columns)

    return task_code(round_rows)


def rounding(x: NDArray[np.float32], out: NDArray[np.uint8]) -> Operation:
    """What fills `new_records` from the rows of x."""
    rows, columns = x.shape
    chunk = max(1, CHUNK // columns)
    return operation(round_rows_code(), -(-rows // chunk), address(x), address(out), rows, columns, chunk)


@njit(nogil=True, inline="always")
def _panel_product(
    x: Any, rows: int, groups: int, codes: Any, at: int, ahead: int, affine: Any, pair: int,
    group: int, begin: int, end: int, out: Any, start: int, width: int, bits: int, segment: int, most: int,
) -> None:  # fmt: skip
    """`code_product` for all rows, of `groups` records each."""
    row = 0
    while row < rows:
        first, height = _first_record(row, rows, groups)
        left, to = height - row % ROWS, start + row * width
        if left >= most:
            code_product(
                x, first, height, codes, at, ahead, affine, pair, group, begin, end, out, to, width,
                bits, segment, most,
            )  # fmt: skip
            row += most
        elif most > 4 and left >= 4:
            code_product(
                x, first, height, codes, at, ahead, affine, pair, group, begin, end, out, to, width,
                bits, segment, 4,
            )  # fmt: skip
            row += 4
        elif most > 2 and left >= 2:
            code_product(
                x, first, height, codes, at, ahead, affine, pair, group, begin, end, out, to, width,
                bits, segment, 2,
            )  # fmt: skip
            row += 2
        else:
            code_product(
                x, first, height, codes, at, ahead, affine, pair, group, begin, end, out, to, width,
                bits, segment, 1,
            )  # fmt: skip
            row += 1


@once
def coded_rows_code(bits: int, segment: int, half: bool) -> Any:
    """Records, rows, columns, codes, their scales and biases, group, out, panels, panels of a task.

    `segment` is how many columns are summed as integers, `half` whether scales and biases are float16.
    """
    most, of_word = TILE_ROWS, 16 // bits

    def coded_rows(at: int, task: int) -> None:
        a = longs(at)
        x, rows, columns, codes = octets(a[0]), a[1], a[2], octets(a[3])
        affine = halves(a[4]) if half else floats(a[4])
        group, out, width = a[5], floats(a[6]), a[7] * PANEL
        groups, records = columns // group, -(-columns // COLUMNS)
        line = 2 * PANEL * group
        turns = -(-columns // max(DEPTH, group))
        depth = -(-groups // turns)
        apart = codes if rows <= FEW else np.empty(depth * line + LINE, np.uint8)
        skip = -apart.ctypes.data % LINE
        for panel in range(task * a[8], min(a[7], (task + 1) * a[8])):
            start, pair = panel * PANEL, panel * groups * 2 * PANEL
            size, steps = groups * line // of_word, group // (2 * of_word)
            if rows <= FEW:
                _panel_product(
                    x, rows, records, codes, panel * size, size, affine, pair,
                    group, 0, groups, out, start, width, bits, segment, most,
                )  # fmt: skip
                continue
            for begin in range(0, groups, depth):
                end = min(groups, begin + depth)
                first = panel * size + begin * line // of_word
                widen_words(codes, first, (end - begin) * steps, apart, skip, bits)
                _panel_product(
                    x, rows, records, apart, skip, 0, affine, pair,
                    group, begin, end, out, start, width, 16, segment, most,
                )  # fmt: skip

    return task_code(coded_rows)
