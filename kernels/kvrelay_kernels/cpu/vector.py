"""Building blocks of LLVM IR on generic vectors, which LLVM lowers alike to AVX-512, AVX2 and NEON.

Numba's own vectorizer leaves loops over packed 4-bit codes scalar (a tenth of the speed), so the
innermost tiles are emitted with these. Vectors are wider than a register on purpose: LLVM splits them.
Numba's cache knows only the cached function's own file: who edits an emitter deletes `__pycache__/*.nb?`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

FLOAT = ir.FloatType()
HALF = ir.HalfType()
BYTE = ir.IntType(8)
WORD = ir.IntType(16)
INT = ir.IntType(32)


def emitted(build: Callable[..., Any]) -> Callable[..., Any]:
    """Make a Numba function of `build(typing, *argument types)`, which returns signature and emitter."""
    return intrinsic(prefer_literal=True)(build)


def host_registers() -> tuple[int, int]:
    """`(float32 lanes, vector registers)` of this processor."""
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 32
    if features.get("avx2"):
        return 8, 16
    return (4, 32) if "neon" in features or "fp-armv8" in features else (4, 16)


def element(context: Any, builder: Any, array_type: Any, array: Any, index: Any, kind: ir.Type) -> Any:
    """Pointer to element `index` of an array's memory, counted in items of `kind` (views are contiguous)."""
    data = arrayobj.make_array(array_type)(context, builder, array).data
    return offset(builder, data, index, kind)


def offset(builder: Any, pointer: Any, index: Any, kind: ir.Type) -> Any:
    """`pointer + index` in items of `kind`."""
    return builder.gep(builder.bitcast(pointer, kind.as_pointer()), [index])


def load(builder: Any, pointer: Any, lanes: int, kind: ir.Type = FLOAT) -> Any:
    """`lanes` neighbouring items as one vector; halves are widened to float32."""
    at = builder.bitcast(pointer, ir.VectorType(kind, lanes).as_pointer())
    value = builder.load(at, align=1 if kind == BYTE else 2 if kind in (HALF, WORD) else 4)
    return builder.fpext(value, ir.VectorType(FLOAT, lanes)) if kind == HALF else value


def store(builder: Any, value: Any, pointer: Any) -> None:
    """Write a vector of float32, or of 16-bit words, to neighbouring items."""
    align = 2 if value.type.element == WORD else 4
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=align)


def prefetch(builder: Any, pointer: Any, nbytes: int) -> None:
    """Ask for the cache lines of `nbytes` bytes, to be read soon."""
    address = builder.bitcast(pointer, BYTE.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [address.type, INT, INT, INT])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    for line in range(0, nbytes, 64):
        builder.call(function, [builder.gep(address, [INT(line)]), INT(0), INT(3), INT(1)])


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """A vector with `value` in every lane."""
    kind = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, INT(0))
    return builder.shuffle_vector(
        first, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(INT, lanes), None)
    )


def shuffled(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    """Lanes of two vectors, which are counted through, in any order."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, len(order)), [INT(i) for i in order]))


def lane(builder: Any, value: Any, number: int, lanes: int) -> Any:
    """One lane of a vector in every lane of another."""
    return shuffled(builder, value, value, [number] * lanes)


def joined(builder: Any, values: list[Any]) -> Any:
    """Two to a power of vectors behind each other."""
    while len(values) > 1:
        order = list(range(2 * values[0].type.count))
        values = [shuffled(builder, a, b, order) for a, b in zip(values[0::2], values[1::2], strict=True)]
    return values[0]


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, fused where the processor can; where c is None, there is nothing to add to."""
    if c is None:
        return builder.fmul(a, b)
    lanes = a.type.count
    kind = ir.FunctionType(a.type, [a.type] * 3)
    return builder.call(
        cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{lanes}f32"), [a, b, c]
    )


def host_pairs() -> tuple[str, int]:
    """This processor's instruction that multiplies words and adds pairs of products, and its words; or 0."""
    features = binding.get_host_cpu_features()
    if features.get("avx512bw"):
        return "llvm.x86.avx512.pmaddw.d.512", 32
    return ("llvm.x86.avx2.pmadd.wd", 16) if features.get("avx2") else ("", 0)


def add_pairs(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """`c[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]`, of 16-bit a and b and 32-bit c: exact where it fits.

    LLVM makes one instruction of product and sum where the processor has it (AVX512-VNNI).
    """
    name, words = host_pairs()
    lanes = c.type.count
    if not words:
        whole = ir.VectorType(INT, 2 * lanes)
        product = builder.mul(builder.sext(a, whole), builder.sext(b, whole))
        even, odd = (
            shuffled(builder, product, product, list(range(side, 2 * lanes, 2))) for side in range(2)
        )
        return builder.add(c, builder.add(even, odd))
    kind = ir.FunctionType(ir.VectorType(INT, words // 2), [ir.VectorType(WORD, words)] * 2)
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    pieces = []
    for first in range(0, 2 * lanes, words):
        order = list(range(first, first + words))
        sides = [shuffled(builder, side, side, order) for side in (a, b)] if words < 2 * lanes else [a, b]
        pieces.append(builder.call(function, sides))
    return builder.add(c, joined(builder, pieces))


def total(builder: Any, value: Any) -> Any:
    """The sum of all lanes, as a tree."""
    kind = ir.FunctionType(FLOAT, [FLOAT, value.type])
    name = f"llvm.vector.reduce.fadd.v{value.type.count}f32"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [FLOAT(0.0), value], fastmath=("reassoc",))


def totals(builder: Any, four: list[Any]) -> Any:
    """The sums of the lanes of four vectors, as one vector: halves are added, two vectors in one."""

    def halved(a: Any, b: Any) -> Any:
        """`[a's halves added | b's halves added]`, as wide as one of them."""
        n = a.type.count
        low, high = list(range(n // 2)), list(range(n // 2, n))
        return builder.fadd(
            shuffled(builder, a, b, low + [n + i for i in low]),
            shuffled(builder, a, b, high + [n + i for i in high]),
        )

    def folded(a: Any, pieces: int) -> Any:
        """The halves of each of `pieces` neighbouring stretches added."""
        size = a.type.count // pieces
        low = [piece * size + i for piece in range(pieces) for i in range(size // 2)]
        return builder.fadd(
            shuffled(builder, a, a, low), shuffled(builder, a, a, [i + size // 2 for i in low])
        )

    while four[0].type.count > 16:
        four = [folded(value, 1) for value in four]
    pairs = [halved(four[0], four[1]), halved(four[2], four[3])]
    n = pairs[0].type.count
    quarters = [piece * (n // 2) + i for piece in range(4) for i in range(n // 4)]
    result = builder.fadd(
        shuffled(builder, pairs[0], pairs[1], quarters),
        shuffled(builder, pairs[0], pairs[1], [i + n // 4 for i in quarters]),
    )
    while result.type.count > 4:
        result = folded(result, 4)
    return result


@contextmanager
def loop(builder: Any, start: Any, stop: Any) -> Iterator[Any]:
    """A counted loop from `start` to `stop`; yields the index."""
    with cgutils.for_range(builder, stop, start=start) as counter:
        yield counter.index


def unrolled(
    builder: Any, start: Any, stop: Any, times: int, body: Callable[[Any], None],
    turn: Callable[[Any], None] = lambda index: None,
) -> None:  # fmt: skip
    """`body(index)` for each index, `times` of them in one turn of the loop and the rest one by one.

    `turn(index)` comes once before the first of each full turn.
    """
    kind = start.type
    turns = builder.sdiv(builder.sub(stop, start), kind(times))
    with cgutils.for_range(builder, turns) as counter:
        base = builder.add(start, builder.mul(counter.index, kind(times)))
        turn(base)
        for step in range(times):
            body(builder.add(base, kind(step)))
    with loop(builder, builder.add(start, builder.mul(turns, kind(times))), stop) as index:
        body(index)


class Registers:
    """Vectors that live across a loop: stack slots that LLVM turns into registers."""

    def __init__(self, builder: Any, count: int, lanes: int) -> None:
        self.builder = builder
        self.slots = [cgutils.alloca_once(builder, ir.VectorType(FLOAT, lanes)) for _ in range(count)]
        self.kind = ir.VectorType(FLOAT, lanes)

    def __getitem__(self, index: int) -> Any:
        return self.builder.load(self.slots[index])

    def __setitem__(self, index: int, value: Any) -> None:
        self.builder.store(value, self.slots[index])

    def clear(self) -> None:
        """Zero in all of them."""
        for slot in self.slots:
            self.builder.store(ir.Constant(self.kind, None), slot)


def exponential(builder: Any, x: Any) -> Any:
    """e^x within 2 ulp: x = n ln 2 + r, a polynomial in r (Cephes' expf), n into the exponent; 0 below -87.

    NaN stays NaN: the rounding to n is done by adding 1.5 * 2^23, never by a conversion to integers.
    """
    lanes = x.type.count
    kind, whole = x.type, ir.VectorType(INT, lanes)

    def constant(value: float) -> Any:
        return ir.Constant(kind, [FLOAT(value)] * lanes)

    high = builder.select(builder.fcmp_ordered(">", x, constant(88.0)), constant(88.0), x)
    shifted = multiply_add(builder, high, constant(1.4426950408889634), constant(12582912.0))
    n = builder.fsub(shifted, constant(12582912.0))
    r = multiply_add(builder, n, constant(-0.693359375), high)
    r = multiply_add(builder, n, constant(2.12194440e-4), r)
    y = constant(1.9875691500e-4)
    for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = multiply_add(builder, y, r, constant(term))
    y = builder.fadd(multiply_add(builder, y, builder.fmul(r, r), r), constant(1.0))
    power = builder.shl(builder.bitcast(shifted, whole), splat(builder, INT(23), lanes))
    power = builder.bitcast(builder.add(power, splat(builder, INT(127 << 23), lanes)), kind)
    return builder.select(
        builder.fcmp_ordered("<", x, constant(-87.0)), constant(0.0), builder.fmul(y, power)
    )


def extreme(builder: Any, value: Any, which: str) -> Any:
    """The smallest (`fmin`) or largest (`fmax`) lane; NaN lanes are passed over."""
    kind = ir.FunctionType(FLOAT, [value.type])
    name = f"llvm.vector.reduce.{which}.v{value.type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [value])


def largest_integer(builder: Any, value: Any) -> Any:
    """The largest lane of signed integers."""
    kind = ir.FunctionType(INT, [value.type])
    name = f"llvm.vector.reduce.smax.v{value.type.count}i32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [value])


def interleave(builder: Any, value: Any) -> Any:
    """Lanes of the first and second half in turn: low and high nibbles as neighbours again."""
    half = value.type.count // 2
    order = [INT(lane // 2 + (lane % 2) * half) for lane in range(2 * half)]
    return builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(INT, 2 * half), order))


def separate(builder: Any, value: Any) -> Any:
    """Even lanes first, then odd ones: as low and high nibbles come."""
    lanes = value.type.count
    order = [INT(lane) for lane in (*range(0, lanes, 2), *range(1, lanes, 2))]
    return builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(INT, lanes), order))


def nearest(builder: Any, value: Any) -> Any:
    """Each lane rounded to an integer, halves to even."""
    kind = ir.FunctionType(value.type, [value.type])
    name = f"llvm.nearbyint.v{value.type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [value])
