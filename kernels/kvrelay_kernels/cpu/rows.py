"""Operations on whole rows: norms, gates, sums and single rows of an embedding.

Each `_code` names the arguments of its operation; arrays are addresses of contiguous float32.
"""

from functools import cache as once
from typing import Any

import numpy as np
from numba import types

from kvrelay_kernels.cpu import vector
from kvrelay_kernels.cpu.coded import round_columns
from kvrelay_kernels.cpu.codes import E4M3_UNIT
from kvrelay_kernels.cpu.integers import affine_at
from kvrelay_kernels.cpu.program import ROUNDED, doubles, floats, halves, longs, octets, task_code, words
from kvrelay_kernels.cpu.tiles import PANEL
from kvrelay_kernels.cpu.vector import FLOAT, Registers, emitted
from kvrelay_kernels.quant.levels import decode_e4m3

LANES = 32


@emitted
def square_sum(typing: Any, x: Any, first: Any, count: Any) -> Any:
    """Sum of squares of `count` items of x from `first` on, in one fixed order for every caller."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_, first_, count_ = args
        at = vector.element(context, builder, signature.args[0], x_, first_, FLOAT)
        word = first_.type
        wide, tail = Registers(builder, 1, LANES), Registers(builder, 1, 1)
        wide.clear()
        tail.clear()
        turns = builder.sdiv(count_, word(LANES))
        with vector.loop(builder, word(0), turns) as turn:
            value = vector.load(
                builder, vector.offset(builder, at, builder.mul(turn, word(LANES)), FLOAT), LANES
            )
            wide[0] = vector.multiply_add(builder, value, value, wide[0])
        with vector.loop(builder, builder.mul(turns, word(LANES)), count_) as index:
            value = vector.load(builder, vector.offset(builder, at, index, FLOAT), 1)
            tail[0] = vector.multiply_add(builder, value, value, tail[0])
        rest = builder.extract_element(tail[0], vector.INT(0))
        return builder.fadd(vector.total(builder, wide[0]), rest)

    return types.float32(x, types.intp, types.intp), generate


@emitted
def gate_lanes(
    typing: Any, x: Any, left: Any, right: Any, out: Any, target: Any, gelu: Any, lanes: Any
) -> Any:
    """`act(x[left:]) * x[right:]` for `lanes` items; both activations are a * sigmoid(f(a))."""
    lanes_, gelu_ = lanes.literal_value, gelu.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_, left_, right_, out_, target_, *_ = args
        kind = signature.args[0]
        a = vector.load(builder, vector.element(context, builder, kind, x_, left_, FLOAT), lanes_)
        b = vector.load(builder, vector.element(context, builder, kind, x_, right_, FLOAT), lanes_)
        one = vector.splat(builder, FLOAT(1.0), lanes_)
        inner = a
        if gelu_:
            # (1 + tanh(u)) / 2 = sigmoid(2u), u = sqrt(2 / pi) (a + 0.044715 a^3)
            cubic = vector.splat(builder, FLOAT(0.0713548162726), lanes_)
            line = vector.splat(builder, FLOAT(1.59576912161), lanes_)
            inner = builder.fmul(a, vector.multiply_add(builder, cubic, builder.fmul(a, a), line))
        below = builder.fadd(one, vector.exponential(builder, builder.fneg(inner)))
        result = builder.fmul(builder.fdiv(a, below), b)
        vector.store(
            builder, result, vector.element(context, builder, signature.args[3], out_, target_, FLOAT)
        )
        return context.get_dummy_value()

    return types.void(x, types.intp, types.intp, out, types.intp, gelu, lanes), generate


@once
def norm_code() -> Any:
    """x, weight, out, rows, width, rows of a task, eps."""

    def norm(at: int, task: int) -> None:
        a = longs(at)
        x, weight, out = floats(a[0]), floats(a[1]), floats(a[2])
        rows, width, chunk, eps = a[3], a[4], a[5], doubles(at)[6]
        for row in range(task * chunk, min(rows, (task + 1) * chunk)):
            start = row * width
            scale = np.float32(1 / np.sqrt(square_sum(x, start, width) / width + eps))
            for i in range(width):
                out[start + i] = x[start + i] * scale * weight[i]
            if a[ROUNDED] != 0:
                round_columns(out, start, 0, width, octets(a[ROUNDED]), row, rows, width)

    return task_code(norm)


@once
def add_norm_code() -> Any:
    """x, y, weight, sum, out, rows, width, rows of a task, eps."""

    def add_norm(at: int, task: int) -> None:
        a = longs(at)
        x, y, weight, summed, out = floats(a[0]), floats(a[1]), floats(a[2]), floats(a[3]), floats(a[4])
        rows, width, chunk, eps = a[5], a[6], a[7], doubles(at)[8]
        for row in range(task * chunk, min(rows, (task + 1) * chunk)):
            start = row * width
            for i in range(start, start + width):
                summed[i] = x[i] + y[i]
            scale = np.float32(1 / np.sqrt(square_sum(summed, start, width) / width + eps))
            for i in range(width):
                out[start + i] = summed[start + i] * scale * weight[i]
            if a[ROUNDED] != 0:
                round_columns(out, start, 0, width, octets(a[ROUNDED]), row, rows, width)

    return task_code(add_norm)


@once
def gate_code(gelu: bool) -> Any:
    """Left and right halves side by side, out, rows, width of a half, columns of a task, tasks of a row."""

    def gate(at: int, task: int) -> None:
        a = longs(at)
        x, out, rows, width, columns = floats(a[0]), floats(a[1]), a[2], a[3], a[4]
        row, piece = divmod(task, a[5])
        left, target = row * 2 * width, row * width
        first, last = piece * columns, min(width, (piece + 1) * columns)
        i = first
        while i + LANES <= last:
            gate_lanes(x, left + i, left + width + i, out, target + i, gelu, LANES)
            i += LANES
        while i < last:
            gate_lanes(x, left + i, left + width + i, out, target + i, gelu, 1)
            i += 1
        if a[ROUNDED] != 0:
            round_columns(out, target, first, last, octets(a[ROUNDED]), row, rows, width)

    return task_code(gate)


@once
def embed_code(bits: int, half: bool, small: bool) -> Any:
    """Codes, their scales and biases, group, columns, token ids, out, rows, rows of a task, factor.

    `small`: codes are 8-bit floats.
    """
    of_word = 16 // bits or 1
    numbers = decode_e4m3(np.arange(256, dtype=np.uint8)) / np.float32(E4M3_UNIT)

    def embed(at: int, task: int) -> None:
        a = longs(at)
        affine = halves(a[1]) if half else floats(a[1])
        codes = octets(a[0]) if small else floats(a[0]) if bits == 32 else halves(a[0])
        group, columns, ids, out = a[2], a[3], words(a[4]), floats(a[5])
        rows, chunk, factor = a[6], a[7], np.float32(doubles(at)[8])
        for row in range(task * chunk, min(rows, (task + 1) * chunk)):
            panel, lane = divmod(ids[row], PANEL)
            for column in range(columns):
                if bits == 32:
                    value = codes[(panel * columns + column) * PANEL + lane]
                elif small:
                    groups = -(-columns // group)
                    scale = affine[(panel * groups + column // group) * PANEL + lane]
                    value = numbers[codes[(panel * columns + column) * PANEL + lane]] * scale
                else:
                    step, place = divmod(column, 2 * of_word)
                    line = (panel * (columns // (2 * of_word)) + step) * PANEL + lane
                    code = codes[line * 2 + place % 2] >> (bits * (place // 2)) & (2**bits - 1)
                    pair = (panel * (columns // group) + column // group) * 2 * PANEL + lane
                    value = affine_at(affine, pair) * np.float32(code) + affine_at(affine, pair + PANEL)
                out[row * columns + column] = value * factor

    return task_code(embed)


@once
def trim_code() -> Any:
    """x, its width, out, its width, rows, rows of a task, what to add to a row or 0."""

    def trim(at: int, task: int) -> None:
        a = longs(at)
        x, wide, out, width, bias = floats(a[0]), a[1], floats(a[2]), a[3], floats(a[6])
        for row in range(task * a[5], min(a[4], (task + 1) * a[5])):
            for i in range(width):
                out[row * width + i] = x[row * wide + i] + (bias[i] if a[6] != 0 else np.float32(0))

    return task_code(trim)
