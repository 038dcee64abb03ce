"""Rotary embedding of q and k, their rotation, and the quantized write of k and v into the arena."""

from functools import cache as once
from typing import Any

import numpy as np
from numba import njit

from kvrelay_kernels.cpu.blocks import put_token
from kvrelay_kernels.cpu.forms import form_of
from kvrelay_kernels.cpu.program import doubles, floats, longs, octets, task_code, words
from kvrelay_kernels.cpu.rotation import rotate
from kvrelay_kernels.cpu.rows import square_sum
from kvrelay_kernels.cpu.vector import BYTE
from kvrelay_kernels.quant import BLOCK_TOKENS, parse_format


@njit(nogil=True, error_model="numpy")
def turn(
    x: Any, at: int, dim: int, half: int, weight: Any, normed: bool, eps: Any, cos: Any, sin: Any, angle: int,
    out: Any, target: int,
) -> None:  # fmt: skip
    """One head from element `at` of x: norm if `normed`, rotate by the angles from `angle` on, to `out`."""
    scale = np.float32(1)
    if normed:
        scale = np.float32(1 / np.sqrt(square_sum(x, at, dim) / dim + eps))
    for i in range(dim):
        factor = weight[i] if normed else np.float32(1)
        out[target + i] = x[at + i] * scale * factor
    for i in range(half):
        a, b = out[target + i], out[target + half + i]
        c, s = cos[angle + i], sin[angle + i]
        out[target + i] = a * c - b * s
        out[target + half + i] = b * c + a * s


@once
def append_code(name: str, dim: int) -> Any:
    """qkv, positions, first rows of sequences, block tables, their width, cosines, sines, half the rotated
    elements, weights of q's and k's norms or 0, eps, cache, the layer's place in it, a block's items, places
    in a block, heads, kv heads, q, rows, rows of a task, tasks of a row: each takes some of the kv heads.
    """
    form, turned = form_of(name, dim), parse_format(name, dim).rotates_values
    coded, size, pair = form.item == BYTE, form.row, form.scale_bytes

    def append(at: int, task: int) -> None:
        a = longs(at)
        qkv, positions, row_starts, tables, table_width = (
            floats(a[0]), words(a[1]), words(a[2]), words(a[3]), a[4],
        )  # fmt: skip
        cos, sin, half, q_norm, k_norm = floats(a[5]), floats(a[6]), a[7], floats(a[8]), floats(a[9])
        normed, eps = a[8] != 0, np.float32(doubles(at)[10])
        cache = octets(a[11]) if coded else floats(a[11])
        base, stride, places, heads, kv_heads = a[12], a[13], longs(a[14]), a[15], a[16]
        out, rows, chunk, pieces = floats(a[17]), a[18], a[19], a[20]
        key = np.empty(dim, np.float32)
        width, shared = (heads + 2 * kv_heads) * dim, heads // kv_heads
        sequence = 0
        part, piece = divmod(task, pieces)
        for row in range(part * chunk, min(rows, (part + 1) * chunk)):
            while row >= row_starts[sequence + 1]:
                sequence += 1
            position = positions[row]
            block = base + tables[sequence * table_width + position // BLOCK_TOKENS] * stride
            token, angle = position % BLOCK_TOKENS, position * half
            for head in range(kv_heads * piece // pieces, kv_heads * (piece + 1) // pieces):
                for query in range(head * shared, (head + 1) * shared):
                    target = (row * heads + query) * dim
                    turn(
                        qkv, row * width + query * dim, dim, half, q_norm, normed, eps, cos, sin, angle,
                        out, target,
                    )  # fmt: skip
                    if coded:
                        rotate(out, target, dim)
                index, source = head * BLOCK_TOKENS + token, row * width + (heads + head) * dim
                turn(qkv, source, dim, half, k_norm, normed, eps, cos, sin, angle, key, 0)
                if coded:
                    rotate(key, 0, dim)
                codes, scales = block + places[0] + index * size, block + places[1] + index * pair
                biases = block + places[2] + index * pair
                put_token(key, 0, cache, codes, scales, biases, name, dim)
                codes, scales = block + places[3] + index * size, block + places[4] + index * pair
                biases = block + places[5] + index * pair
                source += kv_heads * dim
                if turned:
                    for i in range(dim):
                        key[i] = qkv[source + i]
                    rotate(key, 0, dim)
                    put_token(key, 0, cache, codes, scales, biases, name, dim)
                else:
                    put_token(qkv, source, cache, codes, scales, biases, name, dim)

    return task_code(append)
