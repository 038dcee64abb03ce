"""The innermost tiles of matrix products, as Numba intrinsics.

Every output is summed over the columns in order, one fused multiply-add a column, whatever tile computes
it: a row's result has the same bits alone, in a batch of eight or within a prompt of a thousand.
"""

from typing import Any

from llvmlite import ir
from numba import types

from kvrelay_kernels.cpu import vector
from kvrelay_kernels.cpu.vector import BYTE, FLOAT, HALF, Registers, emitted

PANEL = 32
"""Weight rows that lie interleaved: one load brings one column of all of them."""
UNROLL = 8


def _affine_kind(array_type: Any) -> ir.Type:
    return HALF if array_type.dtype == types.uint16 else FLOAT


def _column(builder: Any, codes: Any, column: Any, bits: int) -> Any:
    """One column of a panel as it is stored: codes or float32."""
    if bits == 32:
        return vector.load(
            builder, vector.offset(builder, codes, builder.mul(column, column.type(PANEL)), FLOAT), PANEL
        )
    at = vector.offset(builder, codes, builder.mul(column, column.type(PANEL * bits // 8)), BYTE)
    return vector.widen(builder, at, PANEL, bits)


def _scale_and_bias(builder: Any, affine: Any, group: Any, kind: ir.Type) -> tuple[Any, Any]:
    at = vector.offset(builder, affine, builder.mul(group, group.type(2 * PANEL)), kind)
    return vector.load(builder, at, PANEL, kind), vector.load(
        builder, vector.offset(builder, at, group.type(PANEL), kind), PANEL, kind
    )


@emitted
def affine_at(typing: Any, affine: Any, index: Any) -> Any:
    """Item `index` of scales and biases held as float32, or as the bits of float16 in uint16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = _affine_kind(signature.args[0])
        value = builder.load(vector.element(context, builder, signature.args[0], args[0], args[1], kind))
        return builder.fpext(value, FLOAT) if kind == HALF else value

    return types.float32(affine, types.intp), generate


@emitted
def product(
    typing: Any,
    x: Any,
    first: Any,
    columns: Any,
    codes: Any,
    affine: Any,
    panel: Any,
    group: Any,
    out: Any,
    start: Any,
    width: Any,
    bits: Any,
    rows: Any,
    panels: Any,
) -> Any:
    """`rows` rows of x (from element `first`, `columns` apart) times `panels` panels from `panel` on.

    Panels are widened in registers. Results go to `out` from element `start`, rows `width` apart.
    `bits`, `rows` and `panels` are constants.
    """
    bits_, rows_, panels_ = bits.literal_value, rows.literal_value, panels.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (x_, first_, columns_, codes_, affine_, panel_, group_, out_, start_, width_, *_) = args
        types_ = signature.args
        x_at = vector.element(context, builder, types_[0], x_, first_, FLOAT)
        out_at = vector.element(context, builder, types_[7], out_, start_, FLOAT)
        word = first_.type
        item, per_column = (FLOAT, PANEL) if bits_ == 32 else (BYTE, PANEL * bits_ // 8)
        kind = _affine_kind(types_[4])
        groups = builder.sdiv(columns_, group_)
        code_at, affine_at = [], []
        for number in range(panels_):
            which = builder.add(panel_, word(number))
            size = builder.mul(columns_, word(per_column))
            code_at.append(
                vector.element(context, builder, types_[3], codes_, builder.mul(which, size), item)
            )
            skip = builder.mul(which, builder.mul(groups, word(2 * PANEL)))
            affine_at.append(vector.element(context, builder, types_[4], affine_, skip, kind))
        sums = Registers(builder, rows_ * panels_, PANEL)
        sums.clear()

        def run(begin: Any, end: Any, scales: list[Any], biases: list[Any]) -> None:
            def column(index: Any) -> None:
                for number in range(panels_):
                    weight = _column(builder, code_at[number], index, bits_)
                    if bits_ != 32:
                        weight = vector.multiply_add(builder, weight, scales[number], biases[number])
                    for row in range(rows_):
                        at = vector.offset(
                            builder, x_at, builder.add(builder.mul(columns_, word(row)), index), FLOAT
                        )
                        value = vector.splat(builder, builder.load(at, align=4), PANEL)
                        slot = row * panels_ + number
                        sums[slot] = vector.multiply_add(builder, weight, value, sums[slot])

            vector.unrolled(builder, begin, end, UNROLL, column, ask)

        def ask(index: Any) -> None:
            """Fetch what is read at this place of the next panels: a stream ends too soon to be foreseen."""
            for at in code_at:
                place = builder.add(builder.mul(columns_, word(panels_)), index)
                place = vector.offset(builder, at, builder.mul(place, word(per_column)), item)
                vector.prefetch(builder, place, UNROLL * per_column * (4 if bits_ == 32 else 1))

        if bits_ == 32:
            run(word(0), columns_, [], [])
        else:
            with vector.loop(builder, word(0), groups) as index:
                pairs = [_scale_and_bias(builder, at, index, kind) for at in affine_at]
                for at in affine_at:
                    next_panels = builder.add(builder.mul(groups, word(panels_)), index)
                    place = vector.offset(builder, at, builder.mul(next_panels, word(2 * PANEL)), kind)
                    vector.prefetch(builder, place, 2 * PANEL * (2 if kind == HALF else 4))
                begin = builder.mul(index, group_)
                run(
                    begin,
                    builder.add(begin, group_),
                    [pair[0] for pair in pairs],
                    [pair[1] for pair in pairs],
                )
        for row in range(rows_):
            for number in range(panels_):
                where = builder.add(builder.mul(width_, word(row)), word(number * PANEL))
                vector.store(
                    builder, sums[row * panels_ + number], vector.offset(builder, out_at, where, FLOAT)
                )
        return context.get_dummy_value()

    arguments = (
        x,
        types.intp,
        types.intp,
        codes,
        affine,
        types.intp,
        types.intp,
        out,
        types.intp,
        types.intp,
    )
    return types.void(*arguments, bits, rows, panels), generate


@emitted
def expand(
    typing: Any,
    codes: Any,
    affine: Any,
    panel: Any,
    columns: Any,
    group: Any,
    begin: Any,
    end: Any,
    out: Any,
    start: Any,
    width: Any,
    bits: Any,
) -> Any:
    """Columns `begin` to `end` (of one group) of a panel as float32, `width` items of `out` apart."""
    bits_ = bits.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (codes_, affine_, panel_, columns_, group_, begin_, end_, out_, start_, width_, _) = args
        types_ = signature.args
        word = begin_.type
        item, per_column = (FLOAT, PANEL) if bits_ == 32 else (BYTE, PANEL * bits_ // 8)
        size = builder.mul(columns_, word(per_column))
        code_at = vector.element(context, builder, types_[0], codes_, builder.mul(panel_, size), item)
        out_at = vector.element(context, builder, types_[7], out_, start_, FLOAT)
        scale = bias = None
        if bits_ != 32:
            kind = _affine_kind(types_[1])
            skip = builder.mul(panel_, builder.mul(builder.sdiv(columns_, group_), word(2 * PANEL)))
            affine_at = vector.element(context, builder, types_[1], affine_, skip, kind)
            scale, bias = _scale_and_bias(builder, affine_at, builder.sdiv(begin_, group_), kind)

        def column(index: Any) -> None:
            weight = _column(builder, code_at, index, bits_)
            if bits_ != 32:
                weight = vector.multiply_add(builder, weight, scale, bias)
            where = builder.mul(builder.sub(index, begin_), width_)
            vector.store(builder, weight, vector.offset(builder, out_at, where, FLOAT))

        vector.unrolled(builder, begin_, end_, 4, column)
        return context.get_dummy_value()

    whole = (types.intp,) * 5
    return types.void(codes, affine, *whole, out, types.intp, types.intp, bits), generate


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
