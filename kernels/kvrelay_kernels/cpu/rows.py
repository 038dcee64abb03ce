"""Operations on whole rows: norms, gates, sums and single rows of an embedding."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange, types

from kvrelay_kernels.cpu import vector
from kvrelay_kernels.cpu.products import THREADED, share
from kvrelay_kernels.cpu.tiles import PANEL, affine_at
from kvrelay_kernels.cpu.vector import FLOAT, Registers, emitted

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


def _norm(parallel: bool) -> Any:
    @njit(parallel=parallel and THREADED, nogil=True, cache=True, error_model="numpy")
    def norm(x: Any, weight: Any, eps: Any, out: Any, threads: int) -> None:
        rows, width = x.shape
        for thread in prange(threads):
            first, last = share(rows, thread, threads)
            for row in range(first, last):
                scale = np.float32(1 / np.sqrt(square_sum(x, row * width, width) / width + eps))
                for i in range(width):
                    out[row, i] = x[row, i] * scale * weight[i]

    return norm


def _add_norm(parallel: bool) -> Any:
    @njit(parallel=parallel and THREADED, nogil=True, cache=True, error_model="numpy")
    def add_norm(x: Any, y: Any, weight: Any, eps: Any, summed: Any, out: Any, threads: int) -> None:
        rows, width = x.shape
        for thread in prange(threads):
            first, last = share(rows, thread, threads)
            for row in range(first, last):
                for i in range(width):
                    summed[row, i] = x[row, i] + y[row, i]
                scale = np.float32(1 / np.sqrt(square_sum(summed, row * width, width) / width + eps))
                for i in range(width):
                    out[row, i] = summed[row, i] * scale * weight[i]

    return add_norm


def _gate(parallel: bool, gelu: bool) -> Any:
    @njit(parallel=parallel and THREADED, nogil=True, cache=True)
    def gate(x: Any, out: Any, threads: int) -> None:
        rows, width = out.shape
        for thread in prange(threads):
            first, last = share(rows, thread, threads)
            for row in range(first, last):
                left, target = row * 2 * width, row * width
                i = 0
                while i + LANES <= width:
                    gate_lanes(x, left + i, left + width + i, out, target + i, gelu, LANES)
                    i += LANES
                while i < width:
                    gate_lanes(x, left + i, left + width + i, out, target + i, gelu, 1)
                    i += 1

    return gate


NORM = {parallel: _norm(parallel) for parallel in (False, True)}
ADD_NORM = {parallel: _add_norm(parallel) for parallel in (False, True)}
GATE = {
    (parallel, name): _gate(parallel, name == "gelu_tanh")
    for parallel in (False, True)
    for name in ("silu", "gelu_tanh")
}


def _gather(bits: int) -> Callable[..., None]:
    @njit(nogil=True, cache=True)
    def gather(codes: Any, affine: Any, group: int, token_ids: Any, scale: Any, out: Any) -> None:
        columns = out.shape[1]
        groups = columns // group
        for row in range(len(token_ids)):
            panel, lane = divmod(token_ids[row], PANEL)
            for column in range(columns):
                if bits == 32:
                    value = codes[panel, column, lane]
                else:
                    if bits == 8:
                        code = codes[panel, column, lane]
                    else:
                        code = codes[panel, column, lane % 16] >> (4 * (lane // 16)) & 15
                    pair = (panel * groups + column // group) * 2 * PANEL + lane
                    value = affine_at(affine, pair) * np.float32(code) + affine_at(affine, pair + PANEL)
                out[row, column] = value * scale

    return gather


GATHER = {bits: _gather(bits) for bits in (4, 8, 32)}
