"""Vectors of packed codes to vectors of float32 and back, as LLVM IR."""

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils

from kvrelay_kernels.cpu import vector
from kvrelay_kernels.cpu.vector import BYTE, FLOAT, HALF, INT, shuffled, splat
from kvrelay_kernels.quant.levels import Levels, edges_of, magnitudes_of

SHORT = ir.IntType(16)
E4M3_UNIT = 256.0
"""What numbers are short of as `small_floats` reads them."""


def centred(builder: Any, pointer: Any, bits: int) -> list[Any]:
    """16 bytes of codes less half their range, as float32: of 4 bits, low nibbles, then high ones."""
    octets, word = vector.load(builder, pointer, 16, BYTE), ir.VectorType(INT, 16)
    if bits == 8:
        signed = builder.sext(builder.xor(octets, splat(builder, BYTE(0x80), 16)), word)
        return [builder.sitofp(signed, ir.VectorType(FLOAT, 16))]
    wide = builder.zext(builder.xor(octets, splat(builder, BYTE(0x88), 16)), word)
    down = splat(builder, INT(28), 16)
    raised = [builder.shl(wide, splat(builder, INT(bit), 16)) for bit in (28, 24)]
    return [builder.sitofp(builder.ashr(value, down), ir.VectorType(FLOAT, 16)) for value in raised]


def centred_six(builder: Any, pointer: Any) -> Any:
    """16 codes of 6 bits less half their range, as float32, in order."""
    signed = builder.sub(unpack(builder, pointer, 6), splat(builder, SHORT(32), 16))
    return builder.sitofp(builder.sext(signed, ir.VectorType(INT, 16)), ir.VectorType(FLOAT, 16))


def unpack(builder: Any, pointer: Any, bits: int) -> Any:
    """16 codes of 3 or 6 bits as 16-bit integers, in order.

    16 bytes are read, of which 2 * bits count: behind a block's codes lie its scales, so all are there.
    """
    octets = vector.load(builder, pointer, 16, BYTE)
    firsts = [lane * bits // 8 for lane in range(16)]
    pairs = shuffled(builder, octets, octets, [byte for first in firsts for byte in (first, first + 1)])
    kind = ir.VectorType(SHORT, 16)
    raised = builder.shl(
        builder.bitcast(pairs, kind),
        ir.Constant(kind, [SHORT(16 - bits - lane * bits % 8) for lane in range(16)]),
    )
    return builder.lshr(raised, splat(builder, SHORT(16 - bits), 16))


def nibbles(builder: Any, octets: Any) -> Any:
    """The codes of 4 bits in a vector of bytes, in order."""
    count = octets.type.count
    low = builder.and_(octets, splat(builder, BYTE(15), count))
    high = builder.lshr(octets, splat(builder, BYTE(4), count))
    return shuffled(builder, low, high, [lane // 2 + lane % 2 * count for lane in range(2 * count)])


def pack(builder: Any, codes: Any, bits: int) -> Any:
    """A vector of codes, a byte each, as the bytes of `quant.packing.pack_codes`."""

    def every(step: int, first: int, value: Any) -> Any:
        return shuffled(builder, value, value, list(range(first, value.type.count, step)))

    def shifted(value: Any, left: int) -> Any:
        amount = splat(builder, BYTE(abs(left)), value.type.count)
        return builder.shl(value, amount) if left > 0 else builder.lshr(value, amount)

    if bits == 8:
        return codes
    if bits in (3, 4):
        pairs = builder.or_(every(2, 0, codes), shifted(every(2, 1, codes), bits))
        return pairs if bits == 4 else pack(builder, pairs, 6)
    a, b, c, d = (every(4, first, codes) for first in range(4))
    count = a.type.count
    thirds = [
        builder.or_(left, right)
        for left, right in (
            (a, shifted(b, 6)), (shifted(b, -2), shifted(c, 4)), (shifted(c, -4), shifted(d, 2)),
        )
    ]  # fmt: skip
    last = shuffled(builder, thirds[2], thirds[2], [lane % count for lane in range(2 * count)])
    first = shuffled(builder, thirds[0], thirds[1], list(range(2 * count)))
    return shuffled(
        builder, first, last, [third * count + lane for lane in range(count) for third in range(3)]
    )


def lookup(builder: Any, index: Any, numbers: list[float]) -> Any:
    """At most 16 numbers, which float16 holds, by their index: 16 lanes of bytes to float32."""
    table = np.zeros(16, np.float16)
    table[: len(numbers)] = numbers
    octets = table.view(np.uint8).reshape(16, 2)
    low, high = (_bytes_of_table(builder, octets[:, side].tolist(), index) for side in (0, 1))
    both = shuffled(builder, low, high, [lane // 2 + lane % 2 * 16 for lane in range(32)])
    return builder.fpext(builder.bitcast(both, ir.VectorType(HALF, 16)), ir.VectorType(FLOAT, 16))


def table_instruction() -> str | None:
    """What this processor looks bytes up with, by LLVM's name: LLVM has no such operation of its own."""
    if binding.get_default_triple().startswith(("aarch64", "arm64")):
        return "llvm.aarch64.neon.tbl1.v16i8"
    return "llvm.x86.ssse3.pshuf.b.128" if binding.get_host_cpu_features().get("ssse3") else None


def _bytes_of_table(builder: Any, table: list[int], index: Any) -> Any:
    """`table[index]`, 16 lanes."""
    kind = ir.VectorType(BYTE, 16)
    values, name = ir.Constant(kind, [BYTE(value) for value in table]), table_instruction()
    if name:
        function = ir.FunctionType(kind, [kind, kind])
        return builder.call(cgutils.get_or_insert_function(builder.module, function, name), [values, index])
    result = ir.Constant(kind, None)
    for number in range(16):
        found = builder.extract_element(values, builder.extract_element(index, INT(number)))
        result = builder.insert_element(result, found, INT(number))
    return result


def small_floats(builder: Any, octets: Any) -> Any:
    """e4m3 numbers in units of `E4M3_UNIT`, as float32: their bits are a float16's, at other places."""
    kind = ir.VectorType(SHORT, octets.type.count)
    raised = builder.shl(builder.sext(octets, kind), splat(builder, SHORT(7), kind.count))
    halves = builder.and_(raised, splat(builder, SHORT(0xBF80), kind.count))
    value = builder.bitcast(halves, ir.VectorType(HALF, kind.count))
    return builder.fpext(value, ir.VectorType(FLOAT, kind.count))


def to_small_floats(builder: Any, x: Any) -> Any:
    """As `quant.levels.encode_e4m3`."""
    lanes = x.type.count
    word = ir.VectorType(INT, lanes)

    def whole(value: int) -> Any:
        return splat(builder, INT(value), lanes)

    bits = builder.bitcast(x, word)
    size = builder.and_(bits, whole(0x7FFFFFFF))
    # Added to 2^14, a number below the smallest normal one, 2^-6, is rounded to the step of these, 2^-9.
    shift = (127 + 14) << 23
    low = builder.fadd(builder.bitcast(size, x.type), builder.bitcast(whole(shift), x.type))
    low = builder.sub(builder.bitcast(low, word), whole(shift))
    odd = builder.and_(builder.lshr(size, whole(20)), whole(1))
    rebased = builder.add(builder.add(size, odd), whole(((7 - 127) << 23) + 0x7FFFF))
    found = builder.select(
        builder.icmp_unsigned("<", size, whole((127 - 6) << 23)), low, builder.lshr(rebased, whole(20))
    )
    found = builder.select(builder.icmp_unsigned(">=", size, whole(0x43E00000)), whole(0x7E), found)
    sign = builder.and_(builder.lshr(bits, whole(24)), whole(0x80))
    found = builder.select(builder.fcmp_unordered("uno", x, x), whole(0), builder.or_(found, sign))
    return builder.trunc(found, ir.VectorType(BYTE, lanes))


def powers_of_two(builder: Any, exponents: Any) -> Any:
    """2^(exponent - 127) of a vector of bytes; 2^128, which float32 has not, is infinity."""
    lanes = exponents.type.count
    kind = ir.VectorType(INT, lanes)
    bits = builder.shl(builder.zext(exponents, kind), splat(builder, INT(23), lanes))
    none = builder.icmp_unsigned("==", bits, ir.Constant(kind, None))
    bits = builder.select(none, splat(builder, INT(1 << 22), lanes), bits)
    return builder.bitcast(bits, ir.VectorType(FLOAT, lanes))


def nearest_level(builder: Any, x: Any, table: Levels) -> Any:
    """As `quant.levels.encode` for tables of magnitudes."""
    lanes = x.type.count
    word = ir.VectorType(INT, lanes)
    size = builder.bitcast(
        builder.and_(builder.bitcast(x, word), splat(builder, INT(0x7FFFFFFF), lanes)), x.type
    )
    index = ir.Constant(word, None)
    for number, edge in enumerate(edges_of(table).tolist()):
        above = builder.fcmp_ordered(">=" if number % 2 else ">", size, splat(builder, FLOAT(edge), lanes))
        index = builder.add(index, builder.zext(above, word))
    magnitudes = magnitudes_of(table)
    negative = builder.fcmp_ordered("<", x, ir.Constant(x.type, None))
    if magnitudes[0] == 0:
        negative = builder.and_(negative, builder.icmp_unsigned(">", index, ir.Constant(word, None)))
    sign = builder.select(negative, splat(builder, INT(len(magnitudes)), lanes), ir.Constant(word, None))
    return builder.trunc(builder.or_(index, sign), ir.VectorType(BYTE, lanes))


def sum_of_squares(builder: Any, x: Any) -> Any:
    """Summed as a tree of halves, as in `quant.scaled`."""
    squares = builder.fmul(x, x)
    while squares.type.count > 1:
        half = squares.type.count // 2
        low, high = (
            shuffled(builder, squares, squares, list(range(start, start + half))) for start in (0, half)
        )
        squares = builder.fadd(low, high)
    return builder.extract_element(squares, INT(0))


def largest_size(builder: Any, x: Any) -> Any:
    """The largest magnitude; NaN if there is one: as integers, it is above all."""
    lanes = x.type.count
    size = builder.and_(builder.bitcast(x, ir.VectorType(INT, lanes)), splat(builder, INT(0x7FFFFFFF), lanes))
    name = f"llvm.vector.reduce.umax.v{lanes}i32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(INT, [size.type]), name)
    return builder.bitcast(builder.call(function, [size]), FLOAT)
