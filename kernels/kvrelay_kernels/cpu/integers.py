"""Products of coded weights by 16-bit integers, as Numba intrinsics.

Activations are rounded, 32 columns of a row at a time, to multiples of a step, a 32767th of the largest
magnitude among them: an error of at most 2^-16 of that one, where float16 would make 2^-11. A weight is
`scale * code + bias`, so columns add `scale * step * sum(code * integer) + bias * step * sum(integer)` to
an output. Over 32 columns the first sum is at most 32767 * 255 * 32 < 2^28, exact in 32 bits in any order,
and the groups are added in order, in float32. So a row has the same bits alone, in a batch of eight and
within a prompt of a thousand, whichever tile computes it, and whatever the processor multiplies with.

A record holds 32 rounded columns of a row: 32 int16, and as float32 the step, the sum of what was rounded,
and the sums of its halves. The records of eight rows at a time lie as `[columns / 32, rows]`, in the order
that a tile reads them.
"""

from functools import reduce
from typing import Any

from llvmlite import ir
from numba import types

from kvrelay_kernels.cpu import vector
from kvrelay_kernels.cpu.tiles import PANEL
from kvrelay_kernels.cpu.vector import BYTE, FLOAT, HALF, INT, WORD, Registers, emitted

COLUMNS = 32
"""Columns that are rounded together."""
LEAST = COLUMNS // 2
"""Columns that share a weight's scale are a multiple of this."""
RECORD = 2 * COLUMNS + 4 * 4
"""Bytes of a record."""
STEP, WHOLE_SUM, HALF_SUMS = 2 * COLUMNS, 2 * COLUMNS + 4, 2 * COLUMNS + 8
"""Where in a record its float32 are."""
ROWS = 8
"""Rows whose records lie together; the last ones may be fewer."""
LARGEST = 32767
SMALLEST = 1e-30
"""What is smaller by far is rounded to 0, so that no step's inverse overflows."""
INTEGERS = 12582912.0
"""1.5 * 2^23: a float32 beside it has the bits of an integer, which has been rounded to even."""
LANES = 16
"""Outputs of a vector: a 32-bit lane holds a pair of columns."""
HALVES = PANEL // LANES
LINE = 64
"""Bytes of a vector of 16-bit words."""
CHAINS = 8
"""Sums that a tile has at least, so that none waits for the one before."""


def _constant(kind: Any, lanes: int, value: Any) -> Any:
    return ir.Constant(ir.VectorType(kind, lanes), [kind(value)] * lanes)


def _affine_kind(array_type: Any) -> ir.Type:
    return HALF if array_type.dtype == types.uint16 else FLOAT


@emitted
def affine_at(typing: Any, affine: Any, index: Any) -> Any:
    """Item `index` of scales and biases held as float32, or as the bits of float16 in uint16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = _affine_kind(signature.args[0])
        value = builder.load(vector.element(context, builder, signature.args[0], args[0], args[1], kind))
        return builder.fpext(value, FLOAT) if kind == HALF else value

    return types.float32(affine, types.intp), generate


@emitted
def round_record(typing: Any, x: Any, first: Any, out: Any, record: Any, columns: Any) -> Any:
    """`columns` items of x from `first` on, 32 or 16 and then zeros, as one record of `out`.

    NaN or infinity among them becomes the step, and so all that a product makes of the row.
    """
    columns_ = columns.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_, first_, out_, record_, _ = args
        at = vector.element(context, builder, signature.args[0], x_, first_, FLOAT)
        value = vector.load(builder, at, columns_)
        if columns_ < COLUMNS:
            zeros = ir.Constant(value.type, None)
            value = vector.joined(builder, [value, zeros])
        place = builder.mul(record_, record_.type(RECORD))
        to = vector.element(context, builder, signature.args[2], out_, place, BYTE)
        # As integers, magnitudes are in the order of the numbers, with NaN above infinity.
        whole = ir.VectorType(INT, COLUMNS)
        magnitude = builder.and_(builder.bitcast(value, whole), _constant(INT, COLUMNS, 0x7FFFFFFF))
        top = vector.largest_integer(builder, magnitude)
        least = builder.bitcast(FLOAT(SMALLEST), INT)
        top = builder.bitcast(builder.select(builder.icmp_signed(">", top, least), top, least), FLOAT)
        step = builder.fmul(top, FLOAT(1 / LARGEST))
        inverse = vector.splat(builder, builder.fdiv(FLOAT(LARGEST), top), COLUMNS)
        shift = _constant(FLOAT, COLUMNS, INTEGERS)
        shifted = vector.multiply_add(builder, value, inverse, shift)
        words = builder.trunc(builder.bitcast(shifted, whole), ir.VectorType(WORD, COLUMNS))
        vector.store(builder, words, to)
        rounded = builder.fsub(shifted, shift)
        sums = []
        for half in range(2):
            order = [half * LEAST + i for i in range(LEAST)]
            sums.append(vector.total(builder, vector.shuffled(builder, rounded, rounded, order)))
        both = builder.fadd(sums[0], sums[1])
        for number, number_of_steps in enumerate([FLOAT(1), both, *sums]):
            place = builder.gep(to, [INT(STEP + 4 * number)])
            builder.store(
                builder.fmul(number_of_steps, step), builder.bitcast(place, FLOAT.as_pointer()), align=4
            )
        return context.get_dummy_value()

    return types.void(x, types.intp, out, types.intp, columns), generate


def _codes(builder: Any, words: Any, bits: int, number: int) -> Any:
    """Code `number` of each 16-bit word."""
    if number:
        words = builder.lshr(words, _constant(WORD, 2 * LANES, bits * number))
    if bits * (number + 1) < 16:
        words = builder.and_(words, _constant(WORD, 2 * LANES, 2**bits - 1))
    return words


@emitted
def widen_words(typing: Any, codes: Any, first: Any, count: Any, out: Any, start: Any, bits: Any) -> Any:
    """Pairs of words of a panel, `count` from byte `first` on, as words of one code from byte `start` on."""
    bits_ = bits.literal_value
    of_word = 16 // bits_

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes_, first_, count_, out_, start_, _ = args
        source = vector.element(context, builder, signature.args[0], codes_, first_, BYTE)
        target = vector.element(context, builder, signature.args[3], out_, start_, BYTE)
        with vector.loop(builder, count_.type(0), count_) as step:
            at = vector.offset(builder, source, builder.mul(step, step.type(HALVES * LINE)), BYTE)
            to = vector.offset(builder, target, builder.mul(step, step.type(of_word * HALVES * LINE)), BYTE)
            for half in range(HALVES):
                words = vector.load(builder, builder.gep(at, [INT(half * LINE)]), 2 * LANES, WORD)
                for number in range(of_word):
                    place = builder.gep(to, [INT((number * HALVES + half) * LINE)])
                    vector.store(builder, _codes(builder, words, bits_, number), place)
        return context.get_dummy_value()

    return types.void(codes, types.intp, types.intp, out, types.intp, bits), generate


@emitted
def code_product(
    typing: Any,
    x: Any,
    first: Any,
    height: Any,
    codes: Any,
    at: Any,
    ahead: Any,
    affine: Any,
    pair: Any,
    group: Any,
    begin: Any,
    end: Any,
    out: Any,
    start: Any,
    width: Any,
    bits: Any,
    segment: Any,
    rows: Any,
) -> Any:
    """`rows` rounded rows, from record `first` on of `height` rows together, times some groups of a panel.

    These are groups `begin` to `end`: their codes start at byte `at`, scales and biases of the panel's first
    group at item `pair`. Results go to `out` from element `start`, rows `width` apart: written where `begin`
    is 0, else added. What will be read next, `ahead` bytes of codes away, is asked for. `bits`, `segment`
    (columns summed as integers, 16 or 32, a part of `group`) and `rows` are constants.
    """
    bits_, segment_, rows_ = (constant.literal_value for constant in (bits, segment, rows))
    of_word, steps = 16 // bits_, segment_ * bits_ // 32
    chains = max(1, CHAINS // (rows_ * HALVES))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (x_, first_, height_, codes_, at_, ahead_, affine_, pair_, group_, begin_, end_) = args[:11]
        out_, start_, width_ = args[11:14]
        types_ = signature.args
        word = first_.type
        kind = _affine_kind(types_[6])
        x_at = vector.element(context, builder, types_[0], x_, builder.mul(first_, word(RECORD)), BYTE)
        code_at = vector.element(context, builder, types_[3], codes_, at_, BYTE)
        affine_at = vector.element(context, builder, types_[6], affine_, pair_, kind)
        out_at = vector.element(context, builder, types_[11], out_, start_, FLOAT)
        tile = [(index, half) for index in range(rows_) for half in range(HALVES)]

        def result(index: int, half: int) -> Any:
            where = builder.add(builder.mul(width_, word(index)), word(half * LANES))
            return vector.offset(builder, out_at, where, FLOAT)

        def integer_sums(columns_at: Any, place: Any) -> dict[tuple[int, int], Any]:
            """Sums of a segment by row and half, its columns at `columns_at`, its codes at `place`."""
            zero = _constant(INT, LANES, 0)
            sums = [dict.fromkeys(tile, zero) for _ in range(chains)]
            for step in range(steps):
                lines = [builder.gep(place, [INT((step * HALVES + half) * LINE)]) for half in range(HALVES)]
                loaded = [vector.load(builder, line, 2 * LANES, WORD) for line in lines]
                vector.prefetch(builder, vector.offset(builder, lines[0], ahead_, BYTE), HALVES * LINE)
                for number in range(of_word):
                    pair_number = step * of_word + number
                    chain = sums[pair_number % chains]
                    weights = [_codes(builder, words, bits_, number) for words in loaded]
                    for index in range(rows_):
                        source = builder.gep(columns_at, [INT(index * RECORD + 4 * pair_number)])
                        columns = builder.load(builder.bitcast(source, INT.as_pointer()), align=4)
                        columns = vector.splat(builder, columns, LANES)
                        columns = builder.bitcast(columns, ir.VectorType(WORD, 2 * LANES))
                        for half, weight in enumerate(weights):
                            chain[index, half] = vector.add_pairs(
                                builder, columns, weight, chain[index, half]
                            )
            return {
                key: reduce(builder.add, [chain[key] for chain in sums[: steps * of_word]]) for key in tile
            }

        def number_of(record: Any, index: int, place: Any) -> Any:
            """A float32 of the record of the tile's row `index`, in all lanes."""
            source = builder.gep(record, [builder.add(word(index * RECORD), place)])
            value = builder.load(builder.bitcast(source, FLOAT.as_pointer()), align=4)
            return vector.splat(builder, value, LANES)

        totals = Registers(builder, len(tile), LANES)
        totals.clear()
        with builder.if_then(builder.icmp_signed(">", begin_, word(0))):
            for slot, key in enumerate(tile):
                totals[slot] = vector.load(builder, result(*key), LANES)
        parts = builder.sdiv(group_, word(segment_))
        with vector.loop(builder, begin_, end_) as index:
            first = vector.offset(builder, affine_at, builder.mul(index, word(2 * PANEL)), kind)
            places = [vector.offset(builder, first, word(LANES * n), kind) for n in range(2 * HALVES)]
            loaded = [vector.load(builder, place, LANES, kind) for place in places]
            scales, biases = loaded[:HALVES], loaded[HALVES:]
            with vector.loop(builder, word(0), parts) as part:
                number = builder.add(builder.mul(index, parts), part)
                done = builder.sub(number, builder.mul(begin_, parts))
                place = builder.mul(done, word(steps * HALVES * LINE))
                place = vector.offset(builder, code_at, place, BYTE)
                columns_at, sum_at = word(0), word(WHOLE_SUM)
                if segment_ < COLUMNS:
                    half_number = builder.and_(number, word(1))
                    number = builder.lshr(number, word(1))
                    columns_at = builder.mul(half_number, word(2 * segment_))
                    sum_at = builder.add(word(HALF_SUMS), builder.mul(half_number, word(4)))
                record = builder.mul(builder.mul(number, height_), word(RECORD))
                record = vector.offset(builder, x_at, record, BYTE)
                sums = integer_sums(builder.gep(record, [columns_at]), place)
                for slot, (row, half) in enumerate(tile):
                    step, whole = number_of(record, row, word(STEP)), number_of(record, row, sum_at)
                    value = builder.sitofp(sums[row, half], ir.VectorType(FLOAT, LANES))
                    value = builder.fmul(value, step)
                    value = vector.multiply_add(builder, value, scales[half], totals[slot])
                    totals[slot] = vector.multiply_add(builder, whole, biases[half], value)
        for slot, key in enumerate(tile):
            vector.store(builder, totals[slot], result(*key))
        return context.get_dummy_value()

    whole = types.intp
    arguments = (x, whole, whole, codes, whole, whole, affine, whole, whole, whole, whole)
    return types.void(*arguments, out, whole, whole, bits, segment, rows), generate
