"""Attention of prompts: tiles of 64 queries against blocks of 64 keys, as matrix products."""

from collections.abc import Callable
from functools import cache as once
from typing import Any

import numpy as np
from numba import njit, prange

from kvrelay_kernels.cpu.blocks import expand_tokens
from kvrelay_kernels.cpu.forms import form_of
from kvrelay_kernels.cpu.products import THREADED, multiply, share
from kvrelay_kernels.cpu.rotation import rotate
from kvrelay_kernels.cpu.softmax import exponentials, largest
from kvrelay_kernels.quant import BLOCK_TOKENS, parse_format

QUERIES = 64
"""Rows of a query tile."""
LANES = 64
"""V's rows are padded to a multiple of this, the width of `multiply`."""


@once
def expand_kernel(name: str, dim: int) -> Callable[..., None]:
    """Widens one kv head's blocks: keys transposed `[blocks, dim, 64]`, values `[blocks, 64, padded dim]`."""
    form, turned = form_of(name, dim), parse_format(name, dim).rotates_values
    size, pair = form.row, form.scale_bytes

    @njit(parallel=THREADED, nogil=True, cache=True)
    def expand(
        cache: Any, base: int, stride: int, places: Any, table: Any, first: int, length: int, head: int,
        keys: Any, values: Any, threads: int,
    ) -> None:  # fmt: skip
        blocks = -(-length // BLOCK_TOKENS) - first
        pitch = values.shape[2]
        flat = values.reshape(-1)
        for thread in prange(threads):
            rows = np.empty(BLOCK_TOKENS * dim, np.float32)
            begin, end = share(blocks, thread, threads)
            for number in range(begin, end):
                block = base + table[first + number] * stride
                count = min(BLOCK_TOKENS, length - (first + number) * BLOCK_TOKENS)
                token = head * BLOCK_TOKENS
                codes, scales = block + places[0] + token * size, block + places[1] + token * pair
                biases = block + places[2] + token * pair
                expand_tokens(cache, codes, scales, biases, count, rows, 0, dim, name, dim)
                for i in range(dim):
                    for t in range(count):
                        keys[number, i, t] = rows[t * dim + i]
                    keys[number, i, count:] = 0
                codes, scales = block + places[3] + token * size, block + places[4] + token * pair
                target = number * BLOCK_TOKENS * pitch
                biases = block + places[5] + token * pair
                expand_tokens(cache, codes, scales, biases, count, flat, target, pitch, name, dim)
                if turned:
                    for t in range(count):
                        rotate(flat, target + t * pitch, dim)
                # What lies behind the last token may be anything, NaN too; zero weight would not silence it.
                values[number, count:, :] = 0
                values[number, :count, dim:] = 0

    return expand


@njit(parallel=THREADED, nogil=True, cache=True, error_model="numpy")
def attend(
    q: Any, row: int, rows: int, position: int, keys: Any, values: Any, first: int,
    head: int, group: int, heads: int, window: int, scale: Any,
    out: Any, tally: Any, count_tiles: bool, threads: int,
) -> None:  # fmt: skip
    """Heads `head` to `head + group` of rows `row` to `row + rows`, the first at `position`.

    `keys` and `values` hold the blocks from block `first` on. A query sees keys above its position -
    `window` up to its own; tiles without such a pair are not computed.
    """
    dim, pitch = keys.shape[1], values.shape[2]
    keys, values = keys.reshape(-1), values.reshape(-1)
    tiles = -(-rows // QUERIES)
    width = heads * dim
    if count_tiles:
        for tile in range(tiles):
            low = position + tile * QUERIES
            high = position + min((tile + 1) * QUERIES, rows) - 1
            met = high // BLOCK_TOKENS + 1 - max(0, low - window + 1) // BLOCK_TOKENS
            tally[0] += met
            tally[1] += (position + rows - 1) // BLOCK_TOKENS + 1 - met
    for thread in prange(threads):
        scores = np.empty(QUERIES * BLOCK_TOKENS, np.float32)
        sums = np.empty(QUERIES * pitch, np.float32)
        tops, weights = np.empty(QUERIES, np.float32), np.empty(QUERIES, np.float32)
        for task in range(thread, tiles * group, threads):
            tile, h = divmod(task, group)
            begin = tile * QUERIES
            count = min(QUERIES, rows - begin)
            at = (row + begin) * width + (head + h) * dim
            low, high = position + begin, position + begin + count - 1
            sums[:] = 0
            tops[:] = -np.inf
            weights[:] = 0
            for block in range(max(0, low - window + 1) // BLOCK_TOKENS, high // BLOCK_TOKENS + 1):
                number, key = block - first, block * BLOCK_TOKENS
                multiply(
                    q, at, width, keys, number * dim * BLOCK_TOKENS, BLOCK_TOKENS,
                    scores, 0, BLOCK_TOKENS, count, dim, BLOCK_TOKENS, True,
                )  # fmt: skip
                edge = key + BLOCK_TOKENS - 1 > low or key <= high - window
                for r in range(count):
                    line = r * BLOCK_TOKENS
                    if edge:
                        for t in range(max(0, low + r + 1 - key), BLOCK_TOKENS):
                            scores[line + t] = -np.inf
                        for t in range(min(BLOCK_TOKENS, low + r - window + 1 - key)):
                            scores[line + t] = -np.inf
                    top = max(tops[r], largest(scores, line) * scale)
                    if top == -np.inf:
                        scores[line : line + BLOCK_TOKENS] = 0
                        continue
                    if top != tops[r]:
                        shrink = np.float32(np.exp(tops[r] - top))
                        weights[r] *= shrink
                        for i in range(pitch):
                            sums[r * pitch + i] *= shrink
                        tops[r] = top
                    weights[r] += exponentials(scores, line, scale, top)
                start = number * BLOCK_TOKENS * pitch
                multiply(
                    scores, 0, BLOCK_TOKENS, values, start, pitch,
                    sums, 0, pitch, count, BLOCK_TOKENS, pitch, False,
                )  # fmt: skip
            for r in range(count):
                target = at + r * width
                for i in range(dim):
                    out[target + i] = sums[r * pitch + i] / weights[r]
