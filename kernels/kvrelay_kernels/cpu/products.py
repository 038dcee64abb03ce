"""Matrix products on packed weights: widened in registers for few rows, through scratch panels for many."""

from collections.abc import Callable
from functools import cache as once
from typing import Any

import numpy as np
from numba import njit, prange

from kvrelay_kernels.cpu.program import THREADED, floats, halves, longs, octets, task_code
from kvrelay_kernels.cpu.tiles import PANEL, accumulate, expand, product
from kvrelay_kernels.cpu.vector import host_registers

LANES, REGISTERS = host_registers()
MOST_ROWS = 8 if LANES == 16 else 2
"""Rows whose sums fit in registers beside one panel."""
TILE_ROWS = 6
TILE_LANES = 64 if LANES == 16 else 16
WIDE = 2 * PANEL
SHARES = 8
"""Tasks that a thread has of a product: enough to end together, few enough to be claimed cheaply."""
DEPTH = 128
"""Columns widened at once: a scratch panel of 32 KiB stays in the first-level cache."""


@njit(nogil=True, inline="always")
def share(count: int, part: int, parts: int) -> tuple[int, int]:
    """First and last + 1 of `count` items that fall to one of `parts` threads."""
    return count * part // parts, count * (part + 1) // parts


def panels_of_task(panels: int, rows: int, threads: int) -> int:
    """How many panels to cut off at a time, so that all threads end together where the number allows it.

    A row alone wants two or three panels at once: the sums of one would wait for each other.
    """
    least = 2 if rows == 1 else 1
    wanted, each = max(least, panels // (threads * SHARES)), panels // threads
    if panels % threads:
        return wanted
    return next((size for size in range(wanted, each + 1) if each % size == 0), wanted)


@once
def few_rows_code(bits: int, half: bool) -> Any:
    """x, rows, columns, codes, their scales and biases, group, out, panels, panels of a task."""
    most = MOST_ROWS

    def few_rows(at: int, task: int) -> None:
        a = longs(at)
        x, rows, columns = floats(a[0]), a[1], a[2]
        codes = floats(a[3]) if bits == 32 else octets(a[3])
        affine = halves(a[4]) if half else floats(a[4])
        group, out, width = a[5], floats(a[6]), a[7] * PANEL
        panel, last = task * a[8], min(a[7], (task + 1) * a[8])
        while panel < last:
            start = panel * PANEL
            if rows == 1 and last - panel > 2 and (last - panel) % 2:
                product(x, 0, columns, codes, affine, panel, group, out, start, width, bits, 1, 3)
                panel += 3
                continue
            if rows == 1 and panel + 1 < last:
                product(x, 0, columns, codes, affine, panel, group, out, start, width, bits, 1, 2)
                panel += 2
                continue
            row = 0
            while rows - row >= most:
                source, to = row * columns, row * width + start
                product(x, source, columns, codes, affine, panel, group, out, to, width, bits, most, 1)
                row += most
            if most > 4 and rows - row >= 4:
                source, to = row * columns, row * width + start
                product(x, source, columns, codes, affine, panel, group, out, to, width, bits, 4, 1)
                row += 4
            if most > 2 and rows - row >= 2:
                source, to = row * columns, row * width + start
                product(x, source, columns, codes, affine, panel, group, out, to, width, bits, 2, 1)
                row += 2
            if rows - row == 1:
                source, to = row * columns, row * width + start
                product(x, source, columns, codes, affine, panel, group, out, to, width, bits, 1, 1)
            panel += 1

    return task_code(few_rows)


@njit(nogil=True, cache=True)
def multiply(
    x: Any, first: int, stride: int, w: Any, start: int, width: int, out: Any, target: int, pitch: int,
    rows: int, depth: int, lanes: int, fresh: bool,
) -> None:  # fmt: skip
    """`out[rows, lanes] = x[rows, depth] @ w[depth, lanes]`, or added to out where not `fresh`.

    Each matrix lies in a contiguous array from its first element on, its rows so many elements apart.
    `lanes` is a multiple of `TILE_LANES`.
    """
    if fresh:
        for row in range(rows):
            for lane in range(lanes):
                out[target + row * pitch + lane] = 0
    for lane in range(0, lanes, TILE_LANES):
        at, to = start + lane, target + lane
        row, source = 0, first
        while rows - row >= TILE_ROWS:
            accumulate(x, source, stride, w, at, width, out, to, pitch, depth, TILE_ROWS, TILE_LANES)
            row, source, to = row + TILE_ROWS, source + TILE_ROWS * stride, to + TILE_ROWS * pitch
        while rows - row >= 2:
            accumulate(x, source, stride, w, at, width, out, to, pitch, depth, 2, TILE_LANES)
            row, source, to = row + 2, source + 2 * stride, to + 2 * pitch
        if rows - row == 1:
            accumulate(x, source, stride, w, at, width, out, to, pitch, depth, 1, TILE_LANES)


def _many(bits: int) -> Callable[..., None]:
    @njit(parallel=THREADED, nogil=True, cache=True)
    def many_rows(x: Any, codes: Any, affine: Any, group: int, out: Any, threads: int) -> None:
        rows, columns = x.shape
        width = out.shape[1]
        flat, result = x.reshape(-1), out.reshape(-1)
        for thread in prange(threads):
            scratch = np.empty(DEPTH * WIDE + 16, np.float32)
            line = (64 - scratch.ctypes.data % 64) // 4 % 16
            top, bottom = share(rows, thread, threads)
            for panel in range(0, width // PANEL, 2):
                for begin in range(0, columns, DEPTH):
                    end = min(begin + DEPTH, columns)
                    column = begin
                    while column < end:
                        stop = min((column // group + 1) * group, end)
                        at = line + (column - begin) * WIDE
                        for side in range(2):
                            expand(
                                codes, affine, panel + side, columns, group, column, stop,
                                scratch, at + side * PANEL, WIDE, bits,
                            )  # fmt: skip
                        column = stop
                    multiply(
                        flat, top * columns + begin, columns, scratch, line, WIDE,
                        result, top * width + panel * PANEL, width,
                        bottom - top, end - begin, WIDE, begin == 0,
                    )  # fmt: skip

    return many_rows


MANY_ROWS = {bits: _many(bits) for bits in (4, 8, 32)}
