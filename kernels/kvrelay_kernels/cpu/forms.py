"""How the elements of each cache format are read and written in registers.

A form is what `blocks.py` knows of a format. Elements are read a chunk at a time, as vectors of float32 whose
scale comes in behind the product wherever a group is long enough for that to pay.
"""

from abc import ABC, abstractmethod
from functools import cache as once
from typing import Any

from llvmlite import ir

from kvrelay_kernels.cpu import codes, vector
from kvrelay_kernels.cpu.vector import BYTE, FLOAT, HALF, INT
from kvrelay_kernels.quant import CacheFormat, levels, parse_format, scales
from kvrelay_kernels.quant.levels import Levels

LANES = 16
"""Elements that are read as one vector."""
CHUNKS = (64, 32, 16, 8, 4, 2, 1)
"""Elements of a head that may be read together."""
LONG_GROUP = 32
"""Groups from which on a scale comes behind the product; those of shorter ones go into each element."""


class Form(ABC):
    """How one format's elements are read and written."""

    dim: int
    """Elements of a head."""
    item: ir.Type
    """What places in the cache are counted in."""
    row: int
    """Items of a token's codes."""
    chunk: int
    """Elements that are read together."""
    group: int
    """Elements that are written together."""
    groups: int = 0
    """Scales of a token that come in behind the product."""
    scale_bytes: int = 0
    """Bytes of all scales of a token."""
    biased: bool = False
    """Whether biases come with the scales."""
    in_order: bool = True
    """Whether a chunk is read in its own order; else its even elements come first."""

    @property
    def starts(self) -> list[int]:
        """Where in a chunk the vectors of `pieces` begin, in reading order."""
        return list(range(0, self.chunk, min(LANES, self.chunk)))

    @abstractmethod
    def pieces(self, builder: Any, at: Any, scales_at: Any) -> list[Any]:
        """The chunk at `at` in vectors of float32; `scales_at` is where its first scale lies."""

    @abstractmethod
    def encode(self, builder: Any, x: Any) -> tuple[Any, list[Any]]:
        """A vector of one group's codes as they are stored, and its scale and bias, if it has them."""

    def scales(self, builder: Any, at: Any, count: int) -> Any:
        """`count` neighbouring scales as float32, to be multiplied with elements as they are read."""
        raise NotImplementedError("elements of this form have no scales")

    def bias(self, builder: Any, scale: Any, bias: Any) -> Any:
        """What is added to scale * element as it is read, given the bias as it is stored."""
        raise NotImplementedError("elements of this form have no biases")


class Plain(Form):
    """Elements as they are."""

    item = FLOAT

    def __init__(self, dim: int) -> None:
        self.dim = self.row = dim
        self.chunk = self.group = next(lanes for lanes in CHUNKS if dim % lanes == 0)

    def pieces(self, builder: Any, at: Any, scales_at: Any) -> list[Any]:
        """See `Form.pieces`."""
        lanes = min(LANES, self.chunk)
        return [
            vector.load(builder, vector.offset(builder, at, INT(start), FLOAT), lanes)
            for start in self.starts
        ]

    def encode(self, builder: Any, x: Any) -> tuple[Any, list[Any]]:
        """See `Form.encode`."""
        return x, []


class Affine(Form):
    """Codes that are read less half their range; of 4 bits, low nibbles, then high ones."""

    item = BYTE
    biased = True

    def __init__(self, fmt: CacheFormat, dim: int) -> None:
        self.dim, self.bits, self.chunk, self.group = dim, fmt.code_bits, fmt.group, fmt.group
        self.row = dim * self.bits // 8
        self.groups = dim // self.group
        self.scale_bytes = 2 * self.groups
        self.in_order = self.bits != 4

    @property
    def starts(self) -> list[int]:
        """See `Form.starts`."""
        if self.in_order:
            return super().starts
        return [
            start + turn * self.chunk // 2 for start in range(0, self.chunk // 2, LANES) for turn in (0, 1)
        ]

    def pieces(self, builder: Any, at: Any, scales_at: Any) -> list[Any]:
        """See `Form.pieces`."""
        if self.bits == 6:
            return [
                codes.centred_six(builder, vector.offset(builder, at, INT(start * 6 // 8), BYTE))
                for start in self.starts
            ]
        return [
            value
            for base in range(0, self.chunk * self.bits // 8, LANES)
            for value in codes.centred(builder, vector.offset(builder, at, INT(base), BYTE), self.bits)
        ]

    def scales(self, builder: Any, at: Any, count: int) -> Any:
        """See `Form.scales`."""
        return vector.load(builder, at, count, HALF)

    def bias(self, builder: Any, scale: Any, bias: Any) -> Any:
        """See `Form.bias`."""
        middle = vector.splat(builder, FLOAT(2.0 ** (self.bits - 1)), scale.type.count)
        return vector.multiply_add(builder, scale, middle, bias)

    def encode(self, builder: Any, x: Any) -> tuple[Any, list[Any]]:
        """As `quant.affine.quantize`: packed codes, scale and bias; NaN goes into these."""
        lanes, kind, top = x.type.count, x.type, FLOAT(float(2**self.bits - 1))
        low, high = vector.extreme(builder, x, "fmin"), vector.extreme(builder, x, "fmax")
        unordered = builder.bitcast(builder.fcmp_unordered("uno", x, x), ir.IntType(lanes))
        broken = builder.icmp_unsigned("!=", unordered, ir.IntType(lanes)(0))
        low = builder.select(broken, FLOAT(float("nan")), low)
        pair = [builder.fptrunc(value, HALF) for value in (builder.fdiv(builder.fsub(high, low), top), low)]
        step, base = (builder.fpext(value, FLOAT) for value in pair)
        flat = builder.fcmp_ordered("==", step, FLOAT(0.0))
        divisor = vector.splat(builder, builder.select(flat, FLOAT(1.0), step), lanes)
        distance = builder.fdiv(builder.fsub(x, vector.splat(builder, base, lanes)), divisor)
        rounded, zero = vector.nearest(builder, distance), ir.Constant(kind, None)
        most = vector.splat(builder, top, lanes)
        rounded = builder.select(builder.fcmp_ordered("<", rounded, most), rounded, most)
        # An ordered comparison: NaN becomes code 0 here, before the conversion that it would make undefined.
        rounded = builder.select(builder.fcmp_ordered(">", distance, zero), rounded, zero)
        rounded = builder.select(vector.splat(builder, flat, lanes), zero, rounded)
        whole = builder.fptosi(rounded, ir.VectorType(INT, lanes))
        return codes.pack(builder, builder.trunc(whole, ir.VectorType(BYTE, lanes)), self.bits), pair


class Scaled(Form):
    """Codes that stand for numbers, with scales of any kind."""

    item = BYTE

    def __init__(self, fmt: CacheFormat, table: Levels, dim: int) -> None:
        self.dim, self.bits, self.group = dim, fmt.code_bits, fmt.group
        self.table: Levels = table
        self.kind, self.normal = fmt.scheme.scales, fmt.rotates_values
        self.long = self.group >= LONG_GROUP
        self.chunk = next(lanes for lanes in CHUNKS if (self.group if self.long else dim) % lanes == 0)
        self.row = dim * self.bits // 8
        self.groups = dim // self.group if self.long else 0
        self.scale_bytes = dim // self.group * (2 if self.kind == "float16" else 1)

    def pieces(self, builder: Any, at: Any, scales_at: Any) -> list[Any]:
        """See `Form.pieces`."""
        values = list[Any]()
        for start in self.starts:
            place = vector.offset(builder, at, INT(start * self.bits // 8), BYTE)
            if self.bits == 8:
                values.append(codes.small_floats(builder, vector.load(builder, place, LANES, BYTE)))
                continue
            if self.bits == 3:
                index = codes.unpack(builder, place, 3)
                index = builder.trunc(index, ir.VectorType(BYTE, LANES))
            else:
                index = codes.nibbles(builder, vector.load(builder, place, LANES // 2, BYTE))
            values.append(codes.lookup(builder, index, self._numbers))
        if not self.long:
            every = self.scales(builder, scales_at, self.chunk // self.group)
            values = [
                builder.fmul(value, vector.lane(builder, every, number * LANES // self.group, LANES))
                for number, value in enumerate(values)
            ]
        return values

    def scales(self, builder: Any, at: Any, count: int) -> Any:
        """See `Form.scales`; in the unit of the elements."""
        if self.kind == "float16":
            return vector.load(builder, at, count, HALF)
        stored = vector.load(builder, at, count, BYTE)
        found = self._stored_scale(builder, stored)
        unit = codes.E4M3_UNIT if self.table == "e4m3" else 1.0
        return found if unit == 1.0 else builder.fmul(found, vector.splat(builder, FLOAT(unit), count))

    def encode(self, builder: Any, x: Any) -> tuple[Any, list[Any]]:
        """As `quant.scaled.quantize`: packed codes and the scale."""
        lanes = x.type.count
        if self.normal:
            size = builder.fmul(codes.sum_of_squares(builder, x), FLOAT(1 / lanes))
            size = builder.call(builder.module.declare_intrinsic("llvm.sqrt", [FLOAT]), [size])
        else:
            size = builder.fdiv(codes.largest_size(builder, x), FLOAT(levels.largest(self.table)))
        single = vector.splat(builder, size, 1)
        if self.kind == "float16":
            stored = builder.fptrunc(single, ir.VectorType(HALF, 1))
            scale = builder.fpext(stored, single.type)
        else:
            stored = self._scale_code(builder, single)
            scale = self._stored_scale(builder, stored)
        one, zero = (ir.Constant(single.type, [value]) for value in (1.0, 0.0))
        divisor = builder.select(builder.fcmp_ordered("==", scale, zero), one, scale)
        x = builder.fdiv(x, vector.lane(builder, divisor, 0, lanes))
        if self.table == "e4m3":
            found = codes.to_small_floats(builder, x)
        else:
            found = codes.nearest_level(builder, x, self.table)
        return codes.pack(builder, found, self.bits), [builder.extract_element(stored, INT(0))]

    @property
    def _numbers(self) -> list[float]:
        magnitudes = levels.magnitudes_of(self.table).tolist()
        return magnitudes + [-value for value in magnitudes]

    def _scale_code(self, builder: Any, size: Any) -> Any:
        """As `quant.scales.encode`, of one byte."""
        lanes = size.type.count
        word, octets = ir.VectorType(INT, lanes), ir.VectorType(BYTE, lanes)
        infinite = vector.splat(builder, FLOAT(float("inf")), lanes)
        broken = builder.fcmp_unordered(">=", size, infinite)
        if self.kind == "e4m3":
            found = codes.to_small_floats(builder, size)
            return builder.select(broken, vector.splat(builder, BYTE(scales.E4M3_NAN), lanes), found)
        carried = builder.add(
            builder.bitcast(size, word), vector.splat(builder, INT(scales.E8M0_ROUND), lanes)
        )
        found = builder.trunc(builder.lshr(carried, vector.splat(builder, INT(23), lanes)), octets)
        nothing = builder.fcmp_ordered("==", size, ir.Constant(size.type, None))
        found = builder.select(nothing, vector.splat(builder, BYTE(scales.E8M0_ONE), lanes), found)
        return builder.select(broken, vector.splat(builder, BYTE(scales.E8M0_NAN), lanes), found)

    def _stored_scale(self, builder: Any, stored: Any) -> Any:
        """As `quant.scales.decode`, of one byte each."""
        lanes = stored.type.count
        nan = vector.splat(builder, FLOAT(float("nan")), lanes)
        if self.kind == "e4m3":
            unit = vector.splat(builder, FLOAT(codes.E4M3_UNIT), lanes)
            found, mark = builder.fmul(codes.small_floats(builder, stored), unit), scales.E4M3_NAN
        else:
            found, mark = codes.powers_of_two(builder, stored), scales.E8M0_NAN
        broken = builder.icmp_unsigned("==", stored, vector.splat(builder, BYTE(mark), lanes))
        return builder.select(broken, nan, found)


@once
def form_of(name: str, dim: int) -> Form:
    """The form of a format, given by its name, for heads of `dim` elements."""
    fmt = parse_format(name, dim)
    if not fmt.quantized:
        return Plain(dim)
    table = fmt.scheme.levels
    return Affine(fmt, dim) if table is None else Scaled(fmt, table, dim)
