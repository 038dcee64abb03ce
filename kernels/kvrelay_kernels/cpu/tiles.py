"""The innermost tiles of float32 matrix products, as Numba intrinsics.

Every output is summed over the columns in order, one fused multiply-add a column, whatever tile computes
it: a row's result has the same bits alone, in a batch of eight or within a prompt of a thousand.
"""

from typing import Any

from numba import types

from kvrelay_kernels.cpu import vector
from kvrelay_kernels.cpu.vector import FLOAT, Registers, emitted

PANEL = 32
"""Weight rows that lie interleaved: one load brings one column of all of them."""
UNROLL = 8


@emitted
def product(
    typing: Any,
    x: Any,
    first: Any,
    columns: Any,
    weights: Any,
    panel: Any,
    out: Any,
    start: Any,
    width: Any,
    rows: Any,
    panels: Any,
) -> Any:
    """`rows` rows of x (from element `first`, `columns` apart) times `panels` panels from `panel` on.

    Results go to `out` from element `start`, rows `width` apart. `rows` and `panels` are constants.
    """
    rows_, panels_ = rows.literal_value, panels.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (x_, first_, columns_, weights_, panel_, out_, start_, width_, *_) = args
        types_ = signature.args
        x_at = vector.element(context, builder, types_[0], x_, first_, FLOAT)
        out_at = vector.element(context, builder, types_[5], out_, start_, FLOAT)
        word = first_.type
        size = builder.mul(columns_, word(PANEL))
        weight_at = []
        for number in range(panels_):
            skip = builder.mul(builder.add(panel_, word(number)), size)
            weight_at.append(vector.element(context, builder, types_[3], weights_, skip, FLOAT))
        sums = Registers(builder, rows_ * panels_, PANEL)
        sums.clear()

        def column(index: Any) -> None:
            for number, at in enumerate(weight_at):
                place = vector.offset(builder, at, builder.mul(index, word(PANEL)), FLOAT)
                weight = vector.load(builder, place, PANEL)
                for row in range(rows_):
                    place = builder.add(builder.mul(columns_, word(row)), index)
                    value = builder.load(vector.offset(builder, x_at, place, FLOAT), align=4)
                    slot = row * panels_ + number
                    sums[slot] = vector.multiply_add(
                        builder, weight, vector.splat(builder, value, PANEL), sums[slot]
                    )

        def ask(index: Any) -> None:
            """Fetch what is read at this place of the next panels: a stream ends too soon to be foreseen."""
            for at in weight_at:
                place = builder.add(builder.mul(columns_, word(panels_)), index)
                place = vector.offset(builder, at, builder.mul(place, word(PANEL)), FLOAT)
                vector.prefetch(builder, place, UNROLL * PANEL * 4)

        vector.unrolled(builder, word(0), columns_, UNROLL, column, ask)
        for row in range(rows_):
            for number in range(panels_):
                where = builder.add(builder.mul(width_, word(row)), word(number * PANEL))
                to = vector.offset(builder, out_at, where, FLOAT)
                vector.store(builder, sums[row * panels_ + number], to)
        return context.get_dummy_value()

    whole = (types.intp, types.intp)
    return types.void(x, *whole, weights, types.intp, out, *whole, rows, panels), generate


@emitted
def accumulate(
    typing: Any,
    x: Any,
    first: Any,
    stride: Any,
    w: Any,
    start: Any,
    width: Any,
    out: Any,
    target: Any,
    pitch: Any,
    depth: Any,
    rows: Any,
    lanes: Any,
) -> Any:
    """`out[rows, lanes] += x[rows, depth] @ w[depth, lanes]`, all float32, summed over depth in order.

    Each matrix is given by its first element and the distance of its rows. `rows` and `lanes` are constants.
    """
    rows_, lanes_ = rows.literal_value, lanes.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (x_, first_, stride_, w_, start_, width_, out_, target_, pitch_, depth_, *_) = args
        types_ = signature.args
        word = first_.type
        x_at = vector.element(context, builder, types_[0], x_, first_, FLOAT)
        w_at = vector.element(context, builder, types_[3], w_, start_, FLOAT)
        out_at = vector.element(context, builder, types_[6], out_, target_, FLOAT)
        lines = [
            vector.offset(builder, out_at, builder.mul(pitch_, word(row)), FLOAT) for row in range(rows_)
        ]
        sums = Registers(builder, rows_, lanes_)
        for row, line in enumerate(lines):
            sums[row] = vector.load(builder, line, lanes_)

        def column(index: Any) -> None:
            weight = vector.load(
                builder, vector.offset(builder, w_at, builder.mul(index, width_), FLOAT), lanes_
            )
            for row in range(rows_):
                at = vector.offset(builder, x_at, builder.add(builder.mul(stride_, word(row)), index), FLOAT)
                value = vector.splat(builder, builder.load(at, align=4), lanes_)
                sums[row] = vector.multiply_add(builder, weight, value, sums[row])

        vector.unrolled(builder, word(0), depth_, 4, column)
        for row, line in enumerate(lines):
            vector.store(builder, sums[row], line)
        return context.get_dummy_value()

    whole = (types.intp, types.intp)
    return types.void(x, *whole, w, *whole, out, *whole, types.intp, rows, lanes), generate
