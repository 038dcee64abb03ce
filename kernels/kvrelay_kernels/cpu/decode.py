"""Attention of sequences that are written on, a row each: from the quantized blocks, split along the keys."""

from functools import cache as once
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cpu.blocks import ask, blend, reorder, score_tokens, weigh_values
from kvrelay_kernels.cpu.coded import round_columns
from kvrelay_kernels.cpu.forms import form_of
from kvrelay_kernels.cpu.program import (
    ROUNDED,
    address,
    doubles,
    flags,
    floats,
    longs,
    octets,
    task_code,
    words,
)
from kvrelay_kernels.cpu.rotation import rotate
from kvrelay_kernels.cpu.softmax import exponentials, largest
from kvrelay_kernels.cpu.vector import BYTE
from kvrelay_kernels.interface import AttentionSpec
from kvrelay_kernels.quant import BLOCK_TOKENS, parse_format

SPLIT = 4 * BLOCK_TOKENS
"""Keys of one task. Splits begin at multiples of this, so that a result depends on the sequence alone."""


@once
def divide_code() -> Any:
    """Flags of prompts or 0, lengths, sequences, window, kv heads, first task of each sequence, first key of
    each, tally. One task: it divides the work of the sequences that are no prompts.
    """

    def divide(at: int, _: int) -> None:
        a = longs(at)
        prompts, lengths, sequences, window, kv_heads = flags(a[0]), words(a[1]), a[2], a[3], a[4]
        starts, opens, tally = longs(a[5]), longs(a[6]), longs(a[7])
        total = 0
        for s in range(sequences):
            starts[s] = total
            if a[0] == 0 or not prompts[s]:
                first = max(0, lengths[s] - window)
                skipped = first // BLOCK_TOKENS
                opens[s] = first
                tally[0] += (lengths[s] - 1) // BLOCK_TOKENS + 1 - skipped
                tally[1] += skipped
                total += ((lengths[s] - 1) // SPLIT - first // SPLIT + 1) * kv_heads
        starts[sequences] = total

    return task_code(divide)


@once
def attend_code(name: str, dim: int, heads: int) -> Any:
    """q, first rows of sequences, lengths, block tables, their width, first tasks and first keys of
    sequences, cache, the layer's place in it, a block's items, places in a block, kv heads, scale, addresses
    of sums, tops and weights. A task is one kv head, which `heads` query heads share, over one split of keys.
    """
    form = form_of(name, dim)
    coded, biased, size, pair = form.item == BYTE, form.biased, form.row, form.scale_bytes
    all_pairs = BLOCK_TOKENS * pair
    one = np.float32(1)

    def attend(at: int, task: int) -> None:
        a = longs(at)
        q, row_starts, lengths, tables, pitch = (
            floats(a[0]),
            words(a[1]),
            words(a[2]),
            words(a[3]),
            a[4],
        )
        starts, opens = longs(a[5]), longs(a[6])
        cache = octets(a[7]) if coded else floats(a[7])
        base, stride, places, kv_heads = a[8], a[9], longs(a[10]), a[11]
        scale, partials = np.float32(doubles(at)[12]), longs(a[13])
        sums, tops, weights = floats(partials[0]), floats(partials[1]), floats(partials[2])
        query = np.empty(heads * dim, np.float32)
        scores = np.empty(heads * SPLIT, np.float32)
        s = 0
        while task >= starts[s + 1]:
            s += 1
        split, head = divmod(task - starts[s], kv_heads)
        begin = (opens[s] // SPLIT + split) * SPLIT
        source = (row_starts[s] * kv_heads + head) * heads * dim
        for h in range(heads):
            reorder(q, source + h * dim, one, query, h * dim, True, name, dim)
        for i in range(heads * SPLIT):
            scores[i] = -np.inf
        for i in range(heads * dim):
            sums[task * heads * dim + i] = 0
        for key in range(begin, min(begin + SPLIT, lengths[s]), BLOCK_TOKENS):
            skip = max(0, opens[s] - key)
            count = min(BLOCK_TOKENS, lengths[s] - key) - skip
            if count > 0:
                block = base + tables[s * pitch + key // BLOCK_TOKENS] * stride
                token = head * BLOCK_TOKENS + skip
                codes, scales = block + places[0] + token * size, block + places[1] + token * pair
                biases = block + places[2] + token * pair
                target = key - begin + skip
                # Scales lie apart from codes: waiting for their few lines costs as much as all codes.
                ask(cache, block + places[4] + token * pair, all_pairs)
                if biased:
                    ask(cache, block + places[5] + token * pair, all_pairs)
                ahead = block + places[3] + token * size
                score_tokens(
                    cache, codes, scales, biases, count, ahead, query, scores,
                    target, SPLIT, name, dim, heads,
                )  # fmt: skip
        for h in range(heads):
            line = h * SPLIT
            top = largest(scores, line)
            for part in range(BLOCK_TOKENS, SPLIT, BLOCK_TOKENS):
                top = max(top, largest(scores, line + part))
            top *= scale
            weight = np.float32(0)
            for part in range(0, SPLIT, BLOCK_TOKENS):
                weight += exponentials(scores, line + part, scale, top)
            weights[task * heads + h] = weight
            tops[task * heads + h] = top
        for key in range(begin, min(begin + SPLIT, lengths[s]), BLOCK_TOKENS):
            skip = max(0, opens[s] - key)
            count = min(BLOCK_TOKENS, lengths[s] - key) - skip
            if count > 0:
                block = base + tables[s * pitch + key // BLOCK_TOKENS] * stride
                token = head * BLOCK_TOKENS + skip
                codes, scales = block + places[3] + token * size, block + places[4] + token * pair
                biases = block + places[5] + token * pair
                p, target = key - begin + skip, task * heads * dim
                after, token = block, (head + 1) * BLOCK_TOKENS
                if head + 1 == kv_heads:
                    after = (
                        base + tables[s * pitch + min(key + SPLIT, lengths[s] - 1) // BLOCK_TOKENS] * stride
                    )
                    token = 0
                ask(cache, after + places[1] + token * pair, all_pairs)
                if biased:
                    ask(cache, after + places[2] + token * pair, all_pairs)
                ahead = after + places[0] + token * size
                weigh_values(
                    cache, codes, scales, biases, count, ahead, scores, p, SPLIT, sums, target,
                    name, dim, heads,
                )  # fmt: skip

    return task_code(attend)


@once
def merge_code(name: str, dim: int, heads: int) -> Any:
    """First rows of sequences, first tasks of each, kv heads, addresses of sums, tops and weights, out, rows.
    A task is one kv head of a sequence; prompts are passed over.
    """
    one = np.float32(1)
    turned = parse_format(name, dim).rotates_values

    def merge(at: int, task: int) -> None:
        a = longs(at)
        row_starts, starts, kv_heads, partials, out = (
            words(a[0]),
            longs(a[1]),
            a[2],
            longs(a[3]),
            floats(a[4]),
        )
        sums, tops, weights = floats(partials[0]), floats(partials[1]), floats(partials[2])
        s, head = divmod(task, kv_heads)
        first, last = starts[s] + head, starts[s + 1]
        if first >= last:
            return
        merged = np.empty(dim, np.float32)
        for h in range(heads):
            top = tops[first * heads + h]
            for part in range(first + kv_heads, last, kv_heads):
                top = max(top, tops[part * heads + h])
            weight = np.float32(0)
            for i in range(dim):
                merged[i] = 0
            for part in range(first, last, kv_heads):
                factor = np.float32(np.exp(tops[part * heads + h] - top))
                weight += factor * weights[part * heads + h]
                blend(sums, (part * heads + h) * dim, factor, merged, dim)
            to = ((row_starts[s] * kv_heads + head) * heads + h) * dim
            reorder(merged, 0, one / weight, out, to, False, name, dim)
            if turned:
                rotate(out, to, dim)
        if a[ROUNDED] != 0:
            row, size = row_starts[s], heads * dim
            begin, width = head * size, kv_heads * size
            round_columns(out, row * width, begin, begin + size, octets(a[ROUNDED]), row, a[5], width)

    return task_code(merge)


class Partials:
    """Where splits leave their sums, largest scores and sums of weights until they are merged."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.float32)
        self._heads = self._dim = 0
        self.places = np.zeros(3, np.int64)
        """Addresses of sums, tops and weights."""

    def reserve(self, lengths: NDArray[np.int32], spec: AttentionSpec) -> None:
        """Make room for one row a sequence over so many keys; what was there is lost."""
        self._heads, self._dim = spec.heads, spec.head_dim
        self.grow(lengths)

    def grow(self, lengths: NDArray[np.int32]) -> None:
        """`reserve` with the heads of before."""
        queries = int(np.sum(lengths // SPLIT + 2)) * self._heads
        if len(self._memory) < queries * (self._dim + 2):
            self._memory = np.empty(2 * queries * (self._dim + 2), np.float32)
        tops = address(self._memory) + queries * self._dim * 4
        self.places[:] = address(self._memory), tops, tops + queries * 4
