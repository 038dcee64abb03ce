"""Matrix products in float32: few rows by panels, many by tiles."""

from functools import cache as once
from typing import Any

import numpy as np
from numba import njit, prange

from kvrelay_kernels.cpu.program import THREADED, floats, longs, task_code
from kvrelay_kernels.cpu.tiles import PANEL, accumulate, product
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
"""Columns multiplied at once: two panels' are 32 KiB, which stay in the first-level cache."""


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
def few_rows_code() -> Any:
    """x, rows, columns, weights, out, panels, panels of a task."""
    most = MOST_ROWS

    def few_rows(at: int, task: int) -> None:
        a = longs(at)
        x, rows, columns, weights = floats(a[0]), a[1], a[2], floats(a[3])
        out, width = floats(a[4]), a[5] * PANEL
        panel, last = task * a[6], min(a[5], (task + 1) * a[6])
        while panel < last:
            start = panel * PANEL
            if rows == 1 and last - panel > 2 and (last - panel) % 2:
                product(x, 0, columns, weights, panel, out, start, width, 1, 3)
                panel += 3
                continue
            if rows == 1 and panel + 1 < last:
                product(x, 0, columns, weights, panel, out, start, width, 1, 2)
                panel += 2
                continue
            row = 0
            while rows - row >= most:
                product(x, row * columns, columns, weights, panel, out, row * width + start, width, most, 1)
                row += most
            if most > 4 and rows - row >= 4:
                product(x, row * columns, columns, weights, panel, out, row * width + start, width, 4, 1)
                row += 4
            if most > 2 and rows - row >= 2:
                product(x, row * columns, columns, weights, panel, out, row * width + start, width, 2, 1)
                row += 2
            if rows - row == 1:
                product(x, row * columns, columns, weights, panel, out, row * width + start, width, 1, 1)
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


@njit(parallel=THREADED, nogil=True, cache=True)
def many_rows(x: Any, weights: Any, out: Any, threads: int) -> None:
    """Rows of x times panels `[panels, columns, PANEL]`."""
    rows, columns = x.shape
    width = out.shape[1]
    flat, result, packed = x.reshape(-1), out.reshape(-1), weights.reshape(-1)
    for thread in prange(threads):
        scratch = np.empty(DEPTH * WIDE + 16, np.float32)
        line = (64 - scratch.ctypes.data % 64) // 4 % 16
        top, bottom = share(rows, thread, threads)
        for panel in range(0, width // PANEL, 2):
            for begin in range(0, columns, DEPTH):
                depth = min(DEPTH, columns - begin)
                for side in range(2):
                    source = ((panel + side) * columns + begin) * PANEL
                    for column in range(depth):
                        at = line + column * WIDE + side * PANEL
                        for lane in range(PANEL):
                            scratch[at + lane] = packed[source + column * PANEL + lane]
                multiply(
                    flat, top * columns + begin, columns, scratch, line, WIDE,
                    result, top * width + panel * PANEL, width,
                    bottom - top, depth, WIDE, begin == 0,
                )  # fmt: skip
