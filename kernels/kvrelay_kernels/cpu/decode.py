"""Attention of sequences that are written on, a row each: from the quantized blocks, split along the keys."""

from collections.abc import Callable
from functools import cache as once
from typing import Any

import numpy as np
from numba import njit, prange

from kvrelay_kernels.cpu.blocks import ask, blend, reorder, score_tokens, weigh_values
from kvrelay_kernels.cpu.products import THREADED, share
from kvrelay_kernels.cpu.softmax import exponentials, largest
from kvrelay_kernels.quant import BLOCK_TOKENS

SPLIT = 2 * BLOCK_TOKENS
"""Keys of one task. Splits begin at multiples of this, so that a result depends on the sequence alone."""


@once
def decode_kernel(bits: int, group: int, dim: int, heads: int) -> Callable[..., None]:
    """The kernel for one cache format, head dimension and number of query heads a kv head."""
    size = dim * bits // 8 if bits else dim
    pair = 2 * (dim // group) if bits else 0
    all_pairs = BLOCK_TOKENS * pair
    one = np.float32(1)

    @njit(parallel=THREADED, nogil=True, cache=True, error_model="numpy")
    def decode(
        q: Any, prompts: Any, row_starts: Any, lengths: Any, tables: Any,
        cache: Any, base: int, stride: int, places: Any,
        kv_heads: int, window: int, scale: Any, out: Any, tally: Any, threads: int,
    ) -> None:  # fmt: skip
        sequences = len(lengths)
        starts = np.zeros(sequences + 1, np.int64)
        opens = np.zeros(sequences, np.int64)
        for s in range(sequences):
            tasks = 0
            if not prompts[s]:
                opens[s] = max(0, lengths[s] - window)
                tasks = ((lengths[s] - 1) // SPLIT - opens[s] // SPLIT + 1) * kv_heads
                skipped = opens[s] // BLOCK_TOKENS
                tally[0] += (lengths[s] - 1) // BLOCK_TOKENS + 1 - skipped
                tally[1] += skipped
            starts[s + 1] = starts[s] + tasks
        total = starts[sequences]
        if total == 0:
            return
        sums = np.zeros((total, heads, dim), np.float32)
        tops = np.empty((total, heads), np.float32)
        weights = np.empty((total, heads), np.float32)
        for thread in prange(threads):
            query = np.empty(heads * dim, np.float32)
            scores = np.empty(heads * SPLIT, np.float32)
            first, last = share(total, thread, threads)
            s = 0
            for task in range(first, last):
                while task >= starts[s + 1]:
                    s += 1
                split, head = divmod(task - starts[s], kv_heads)
                begin = (opens[s] // SPLIT + split) * SPLIT
                at = (row_starts[s] * kv_heads + head) * heads * dim
                for h in range(heads):
                    reorder(q, at + h * dim, one, query, h * dim, True, bits, group, dim)
                scores[:] = -np.inf
                for key in range(begin, min(begin + SPLIT, lengths[s]), BLOCK_TOKENS):
                    skip = max(0, opens[s] - key)
                    count = min(BLOCK_TOKENS, lengths[s] - key) - skip
                    if count > 0:
                        block = base + tables[s, key // BLOCK_TOKENS] * stride
                        token = head * BLOCK_TOKENS + skip
                        codes, scales = block + places[0] + token * size, block + places[1] + token * pair
                        biases = block + places[2] + token * pair
                        target = key - begin + skip
                        # Scales lie apart from codes: waiting for their few lines costs as much as all codes.
                        ask(cache, block + places[4] + token * pair, all_pairs)
                        ask(cache, block + places[5] + token * pair, all_pairs)
                        ahead = block + places[3] + token * size
                        score_tokens(
                            cache, codes, scales, biases, count, ahead, query, scores,
                            target, SPLIT, bits, group, dim, heads,
                        )  # fmt: skip
                for h in range(heads):
                    line = h * SPLIT
                    top = max(largest(scores, line), largest(scores, line + BLOCK_TOKENS)) * scale
                    weights[task, h] = exponentials(scores, line, scale, top)
                    weights[task, h] += exponentials(scores, line + BLOCK_TOKENS, scale, top)
                    tops[task, h] = top
                for key in range(begin, min(begin + SPLIT, lengths[s]), BLOCK_TOKENS):
                    skip = max(0, opens[s] - key)
                    count = min(BLOCK_TOKENS, lengths[s] - key) - skip
                    if count > 0:
                        block = base + tables[s, key // BLOCK_TOKENS] * stride
                        token = head * BLOCK_TOKENS + skip
                        codes, scales = block + places[3] + token * size, block + places[4] + token * pair
                        biases = block + places[5] + token * pair
                        p, target = key - begin + skip, task * heads * dim
                        after, token = block, (head + 1) * BLOCK_TOKENS
                        if head + 1 == kv_heads:
                            after = (
                                base + tables[s, min(key + SPLIT, lengths[s] - 1) // BLOCK_TOKENS] * stride
                            )
                            token = 0
                        ask(cache, after + places[1] + token * pair, all_pairs)
                        ask(cache, after + places[2] + token * pair, all_pairs)
                        ahead = after + places[0] + token * size
                        weigh_values(
                            cache, codes, scales, biases, count, ahead, scores, p, SPLIT, sums, target,
                            bits, group, dim, heads,
                        )  # fmt: skip
        merged = np.empty(dim, np.float32)
        for s in range(sequences):
            if starts[s] == starts[s + 1]:
                continue
            for head in range(kv_heads):
                first, last = starts[s] + head, starts[s + 1]
                for h in range(heads):
                    top = tops[first, h]
                    for task in range(first + kv_heads, last, kv_heads):
                        top = max(top, tops[task, h])
                    weight = np.float32(0)
                    merged[:] = 0
                    for task in range(first, last, kv_heads):
                        part = np.float32(np.exp(tops[task, h] - top))
                        weight += part * weights[task, h]
                        blend(sums, (task * heads + h) * dim, part, merged, dim)
                    to = ((row_starts[s] * kv_heads + head) * heads + h) * dim
                    reorder(merged, 0, one / weight, out, to, False, bits, group, dim)

    return decode
