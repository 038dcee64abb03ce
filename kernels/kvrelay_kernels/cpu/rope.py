"""Rotary embedding of q and k, and the quantized write of k and v into the arena."""

from collections.abc import Callable
from functools import cache as once
from typing import Any

import numpy as np
from numba import njit, prange

from kvrelay_kernels.cpu.blocks import put_token
from kvrelay_kernels.cpu.products import THREADED, share
from kvrelay_kernels.cpu.rows import square_sum
from kvrelay_kernels.quant import BLOCK_TOKENS


@njit(nogil=True, cache=True, error_model="numpy")
def turn(
    x: Any, at: int, dim: int, weight: Any, eps: Any, cos: Any, sin: Any, position: int, out: Any, target: int
) -> None:
    """One head from element `at` of x: norm where `weight` is not empty, rotate, to `target` of `out`."""
    half = cos.shape[1]
    scale = np.float32(1)
    if len(weight):
        scale = np.float32(1 / np.sqrt(square_sum(x, at, dim) / dim + eps))
    for i in range(dim):
        factor = weight[i] if len(weight) else np.float32(1)
        out[target + i] = x[at + i] * scale * factor
    for i in range(half):
        a, b = out[target + i], out[target + half + i]
        c, s = cos[position, i], sin[position, i]
        out[target + i] = a * c - b * s
        out[target + half + i] = b * c + a * s


@once
def append_kernel(bits: int, group: int, dim: int, parallel: bool) -> Callable[..., None]:
    """The kernel for one cache format and head dimension."""
    size = dim * bits // 8 if bits else dim
    pair = 2 * (dim // group) if bits else 0

    @njit(parallel=parallel and THREADED, nogil=True, cache=True)
    def append(
        qkv: Any, positions: Any, row_starts: Any, tables: Any, cos: Any, sin: Any,
        q_norm: Any, k_norm: Any, eps: Any,
        cache: Any, base: int, stride: int, places: Any, heads: int, kv_heads: int, out: Any, threads: int,
    ) -> None:  # fmt: skip
        rows, width = len(positions), (heads + 2 * kv_heads) * dim
        for thread in prange(threads):
            key = np.empty(dim, np.float32)
            sequence = 0
            first, last = share(rows, thread, threads)
            for row in range(first, last):
                while row >= row_starts[sequence + 1]:
                    sequence += 1
                position = positions[row]
                block = base + tables[sequence, position // BLOCK_TOKENS] * stride
                token = position % BLOCK_TOKENS
                at, target = row * width, row * heads * dim
                for _ in range(heads):
                    turn(qkv, at, dim, q_norm, eps, cos, sin, position, out, target)
                    at += dim
                    target += dim
                for head in range(kv_heads):
                    index = head * BLOCK_TOKENS + token
                    turn(qkv, at, dim, k_norm, eps, cos, sin, position, key, 0)
                    codes, scales = block + places[0] + index * size, block + places[1] + index * pair
                    biases = block + places[2] + index * pair
                    put_token(key, 0, cache, codes, scales, biases, bits, group, dim)
                    codes, scales = block + places[3] + index * size, block + places[4] + index * pair
                    biases = block + places[5] + index * pair
                    put_token(qkv, at + kv_heads * dim, cache, codes, scales, biases, bits, group, dim)
                    at += dim

    return append
