"""Products of float32 rows with weights in 8-bit floats, panel by panel.

Within a group of columns an output is summed in order, one fused multiply-add a column; the sum times the
group's scale is added to those of the groups before. So a row has the same bits in any company, whichever
tile computes it.
"""

from functools import cache as once
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types

from kvrelay_kernels.cpu import vector
from kvrelay_kernels.cpu.coded import FEW, TILE_ROWS
from kvrelay_kernels.cpu.codes import small_floats
from kvrelay_kernels.cpu.program import floats, longs, octets, task_code
from kvrelay_kernels.cpu.tiles import PANEL, UNROLL
from kvrelay_kernels.cpu.vector import BYTE, FLOAT, Registers, emitted

GROUP = 128
"""Columns that share a scale, at most: two panels' floats stay in the first-level cache."""


def _number_kind(array_type: Any) -> ir.Type:
    return BYTE if array_type.dtype == types.uint8 else FLOAT


@emitted
def widen_floats(typing: Any, codes: Any, first: Any, count: Any, out: Any) -> Any:
    """`count` columns of a panel, from byte `first` on, as `small_floats` gives them."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes_, first_, count_, out_ = args
        source = vector.element(context, builder, signature.args[0], codes_, first_, BYTE)
        target = vector.element(context, builder, signature.args[3], out_, first_.type(0), FLOAT)
        with vector.loop(builder, count_.type(0), count_) as column:
            at = builder.mul(column, column.type(PANEL))
            read = vector.load(builder, vector.offset(builder, source, at, BYTE), PANEL, BYTE)
            vector.store(builder, small_floats(builder, read), vector.offset(builder, target, at, FLOAT))
        return context.get_dummy_value()

    return types.void(codes, types.intp, types.intp, out), generate


@emitted
def group_product(
    typing: Any,
    x: Any,
    first: Any,
    stride: Any,
    numbers: Any,
    at: Any,
    apart: Any,
    count: Any,
    scales: Any,
    scale: Any,
    scales_apart: Any,
    out: Any,
    start: Any,
    width: Any,
    fresh: Any,
    rows: Any,
    panels: Any,
) -> Any:
    """`rows` rows of x, `stride` apart, times `count` columns of `panels` panels, times their scales.

    The first panel's columns begin at item `at` of `numbers`, codes or what `widen_floats` made of them, its
    scales at item `scale`; those of the next one lie so many items `apart`. Results go to `out` from element
    `start`, rows `width` apart: written where `fresh`, else added. `rows` and `panels` are constants.
    """
    rows_, panels_ = rows.literal_value, panels.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (x_, first_, stride_, numbers_, at_, apart_, count_) = args[:7]
        (scales_, scale_, scales_apart_, out_, start_, width_, fresh_) = args[7:14]
        types_ = signature.args
        word, kind = first_.type, _number_kind(types_[3])
        x_at = vector.element(context, builder, types_[0], x_, first_, FLOAT)
        out_at = vector.element(context, builder, types_[10], out_, start_, FLOAT)
        tile = [(row, panel) for row in range(rows_) for panel in range(panels_)]

        def begin(array: int, value: Any, item: Any, step: Any, of: ir.Type) -> list[Any]:
            places = [builder.add(item, builder.mul(step, word(panel))) for panel in range(panels_)]
            return [vector.element(context, builder, types_[array], value, place, of) for place in places]

        number_at = begin(3, numbers_, at_, apart_, kind)
        scale_at = begin(7, scales_, scale_, scales_apart_, FLOAT)
        sums = Registers(builder, len(tile), PANEL)
        sums.clear()

        def column(index: Any) -> None:
            place = builder.mul(index, word(PANEL))
            read = [
                vector.load(builder, vector.offset(builder, p, place, kind), PANEL, kind) for p in number_at
            ]
            weights = [small_floats(builder, codes) for codes in read] if kind == BYTE else read
            for row in range(rows_):
                place = builder.add(builder.mul(stride_, word(row)), index)
                value = builder.load(vector.offset(builder, x_at, place, FLOAT), align=4)
                value = vector.splat(builder, value, PANEL)
                for panel, weight in enumerate(weights):
                    slot = row * panels_ + panel
                    sums[slot] = vector.multiply_add(builder, weight, value, sums[slot])

        def ask(index: Any) -> None:
            """Fetch what is read at this place of the next panels."""
            for pointer in number_at if kind == BYTE else []:
                place = builder.add(builder.mul(apart_, word(panels_)), builder.mul(index, word(PANEL)))
                vector.prefetch(builder, vector.offset(builder, pointer, place, BYTE), UNROLL * PANEL)

        vector.unrolled(builder, word(0), count_, UNROLL, column, ask)
        for slot, (row, panel) in enumerate(tile):
            where = builder.add(builder.mul(width_, word(row)), word(panel * PANEL))
            to = vector.offset(builder, out_at, where, FLOAT)
            value = builder.fmul(sums[slot], vector.load(builder, scale_at[panel], PANEL))
            with builder.if_else(fresh_) as (then, otherwise):
                with then:
                    vector.store(builder, value, to)
                with otherwise:
                    vector.store(builder, builder.fadd(vector.load(builder, to, PANEL), value), to)
        return context.get_dummy_value()

    whole = types.intp
    arguments = (x, whole, whole, numbers, whole, whole, whole, scales, whole, whole, out, whole, whole)
    return types.void(*arguments, types.boolean, rows, panels), generate


@njit(nogil=True, inline="always")
def _rows_product(
    x: Any, rows: int, first: int, stride: int, numbers: Any, at: int, apart: int, count: int,
    scales: Any, scale: int, out: Any, start: int, width: int, fresh: bool, most: int,
) -> None:  # fmt: skip
    """`group_product` of all rows with one panel."""
    row = 0
    while row < rows:
        left, at_x, to = rows - row, first + row * stride, start + row * width
        if left >= most:
            group_product(
                x, at_x, stride, numbers, at, apart, count, scales, scale, 0, out, to, width, fresh, most, 1
            )
            row += most
        elif most > 4 and left >= 4:
            group_product(
                x, at_x, stride, numbers, at, apart, count, scales, scale, 0, out, to, width, fresh, 4, 1
            )
            row += 4
        elif most > 2 and left >= 2:
            group_product(
                x, at_x, stride, numbers, at, apart, count, scales, scale, 0, out, to, width, fresh, 2, 1
            )
            row += 2
        else:
            group_product(
                x, at_x, stride, numbers, at, apart, count, scales, scale, 0, out, to, width, fresh, 1, 1
            )
            row += 1


@once
def scaled_rows_code() -> Any:
    """x, rows, columns, codes, scales, group, out, panels, panels of a task."""
    most = TILE_ROWS

    def scaled_rows(at: int, task: int) -> None:
        a = longs(at)
        x, rows, columns, codes = floats(a[0]), a[1], a[2], octets(a[3])
        scales, group, out, width = floats(a[4]), a[5], floats(a[6]), a[7] * PANEL
        groups, size = -(-columns // group), columns * PANEL
        wide = np.empty(group * PANEL if rows > FEW else 0, np.float32)
        panel, last = task * a[8], min(a[7], (task + 1) * a[8])
        while panel < last:
            together = 1
            if rows == 1 and panel + 1 < last:
                together = 3 if last - panel > 2 and (last - panel) % 2 else 2
            for number in range(groups):
                first, start = number * group, panel * PANEL
                count, fresh = min(group, columns - first), number == 0
                codes_at, scale = panel * size + first * PANEL, (panel * groups + number) * PANEL
                if together == 3:
                    group_product(
                        x, first, columns, codes, codes_at, size, count, scales, scale, groups * PANEL,
                        out, start, width, fresh, 1, 3,
                    )  # fmt: skip
                elif together == 2:
                    group_product(
                        x, first, columns, codes, codes_at, size, count, scales, scale, groups * PANEL,
                        out, start, width, fresh, 1, 2,
                    )  # fmt: skip
                elif rows > FEW:
                    widen_floats(codes, codes_at, count, wide)
                    _rows_product(
                        x,
                        rows,
                        first,
                        columns,
                        wide,
                        0,
                        0,
                        count,
                        scales,
                        scale,
                        out,
                        start,
                        width,
                        fresh,
                        most,
                    )
                else:
                    _rows_product(
                        x, rows, first, columns, codes, codes_at, size, count, scales, scale,
                        out, start, width, fresh, most,
                    )  # fmt: skip
            panel += together

    return task_code(scaled_rows)
