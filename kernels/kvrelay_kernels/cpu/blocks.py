"""Reading and writing KV blocks, as Numba intrinsics.

`cache` is the arena as one flat array, bytes for codes and float32 for unquantized blocks (`bits` 0); places
in it are counted in its items. `bits`, `group`, `dim` and `heads` are constants. A key is widened in
registers to scale * code + bias, once for all query heads that share it.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvrelay_kernels.cpu import vector
from kvrelay_kernels.cpu.vector import BYTE, FLOAT, HALF, INT, Registers, emitted
from kvrelay_kernels.quant import BLOCK_TOKENS

LANES = 16
"""Elements that are read as one vector."""
TOGETHER = 4
"""Query heads whose sums are held in registers at once."""


def chunk_of(dim: int, bits: int, group: int) -> int:
    """Elements of a head that are read as one vector: a group, or what divides the head without one."""
    if bits:
        return group
    return next(lanes for lanes in (64, 32, 16, 8, 4, 2, 1) if dim % lanes == 0)


class _Side:
    """Where one kv head's K or V of a block lies, and how to read token by token."""

    def __init__(
        self, context: Any, builder: Any, cache: tuple[Any, Any], at: list[Any], consts: list[Any]
    ) -> None:
        self.bits, self.group, self.dim = (const.literal_value for const in consts)
        self.chunk = chunk_of(self.dim, self.bits, self.group)
        self.builder, self.word = builder, at[0].type
        kind, array = cache
        self.start = vector.element(
            context, builder, kind, array, at[0].type(0), BYTE if self.bits else FLOAT
        )
        self.codes, self.scales, self.biases = (
            vector.element(context, builder, kind, array, place, BYTE if self.bits else FLOAT) for place in at
        )

    def prefetch(self, ahead: Any, token: Any) -> None:
        """Ask for token `token` of the ones from place `ahead` of the cache on."""
        builder, items = self.builder, self.dim * self.bits // 8 if self.bits else self.dim
        index = builder.add(ahead, builder.mul(token, self.word(items)))
        kind = BYTE if self.bits else FLOAT
        vector.prefetch(
            builder, vector.offset(builder, self.start, index, kind), items if self.bits else 4 * items
        )

    @property
    def groups(self) -> int:
        """How many scales a token has; none where the cache is not quantized."""
        return self.dim // self.group if self.bits else 0

    @property
    def starts(self) -> list[int]:
        """Where in a chunk the vectors of `pieces` begin, in reading order."""
        if not self.bits:
            return list(range(0, self.chunk, min(LANES, self.chunk)))
        bases = range(0, self.chunk * self.bits // 8, LANES)
        return [base + turn * self.chunk // 2 for base in bases for turn in range(8 // self.bits)]

    def pieces(self, token: Any, number: int) -> list[tuple[int, Any]]:
        """Chunk `number` of a token in vectors of 16, each with its place in reading order: centred codes, or
        values of an unquantized cache.
        """
        builder, word, values = self.builder, self.word, list[Any]()
        item, size = (BYTE, self.dim * self.bits // 8) if self.bits else (FLOAT, self.dim)
        chunk = size // (self.dim // self.chunk)
        for start in range(0, chunk, min(LANES, chunk)):
            index = builder.add(builder.mul(token, word(size)), word(number * chunk + start))
            place = vector.offset(builder, self.codes, index, item)
            if self.bits:
                values += vector.centred(builder, place, self.bits)
            else:
                values.append(vector.load(builder, place, min(LANES, chunk)))
        return list(zip(self.starts, values, strict=True))

    def scales_of(self, token: Any, tokens: int, number: int) -> tuple[Any, Any]:
        """Scales of chunk `number` of some neighbouring tokens, and what goes with centred codes as bias."""
        builder, groups = self.builder, self.groups
        index = builder.mul(token, self.word(groups))
        order = ir.Constant(
            ir.VectorType(INT, tokens), [INT(turn * groups + number) for turn in range(tokens)]
        )
        scale, bias = (
            builder.shuffle_vector(every, every, order)
            for every in (
                vector.load(builder, vector.offset(builder, side, index, HALF), tokens * groups, HALF)
                for side in (self.scales, self.biases)
            )
        )
        middle = vector.splat(builder, FLOAT(2.0 ** (self.bits - 1)), tokens)
        return scale, vector.multiply_add(builder, scale, middle, bias)

    def read(self, token: Any, number: int) -> Any:
        """Chunk `number` of a token as float32; of 4-bit codes, even elements first."""
        builder, word = self.builder, self.word
        if not self.bits:
            index = builder.add(builder.mul(token, word(self.dim)), word(number * self.chunk))
            return vector.load(builder, vector.offset(builder, self.codes, index, FLOAT), self.chunk)
        size = self.dim * self.bits // 8
        index = builder.add(builder.mul(token, word(size)), word(number * self.chunk * self.bits // 8))
        codes = vector.widen(builder, vector.offset(builder, self.codes, index, BYTE), self.chunk, self.bits)
        which = builder.add(builder.mul(token, word(self.dim // self.group)), word(number))
        scale, bias = (
            builder.fpext(builder.load(vector.offset(builder, side, which, HALF), align=2), FLOAT)
            for side in (self.scales, self.biases)
        )
        return vector.multiply_add(
            builder, codes, vector.splat(builder, scale, self.chunk), vector.splat(builder, bias, self.chunk)
        )


@emitted
def reorder(
    typing: Any, x: Any, first: Any, factor: Any, out: Any, target: Any, inward: Any,
    bits: Any, group: Any, dim: Any,
) -> Any:  # fmt: skip
    """One head times `factor`, from its own order into reading order if `inward` (a constant), else back."""
    inward_, bits_, dim_ = inward.literal_value, bits.literal_value, dim.literal_value
    chunk = chunk_of(dim_, bits_, group.literal_value)
    turn = vector.separate if inward_ else vector.interleave

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_, first_, factor_, out_, target_, *_ = args
        kinds, word = signature.args, first_.type
        x_at = vector.element(context, builder, kinds[0], x_, first_, FLOAT)
        out_at = vector.element(context, builder, kinds[3], out_, target_, FLOAT)
        for start in range(0, dim_, chunk):
            value = vector.load(builder, vector.offset(builder, x_at, word(start), FLOAT), chunk)
            value = builder.fmul(value, vector.splat(builder, factor_, chunk))
            value = turn(builder, value) if bits_ == 4 else value
            vector.store(builder, value, vector.offset(builder, out_at, word(start), FLOAT))
        return context.get_dummy_value()

    places = (out, types.intp, inward, bits, group, dim)
    return types.void(x, types.intp, types.float32, *places), generate


@emitted
def blend(typing: Any, x: Any, first: Any, factor: Any, out: Any, dim: Any) -> Any:
    """`out[0:dim] += x[first : first + dim] * factor`."""
    dim_ = dim.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_, first_, factor_, out_, _ = args
        x_at = vector.element(context, builder, signature.args[0], x_, first_, FLOAT)
        out_at = vector.element(context, builder, signature.args[3], out_, first_.type(0), FLOAT)
        value, before = vector.load(builder, x_at, dim_), vector.load(builder, out_at, dim_)
        after = vector.multiply_add(builder, value, vector.splat(builder, factor_, dim_), before)
        vector.store(builder, after, out_at)
        return context.get_dummy_value()

    return types.void(x, types.intp, types.float32, out, dim), generate


@emitted
def ask(typing: Any, cache: Any, place: Any, items: Any) -> Any:
    """Begin to fetch `items` items (a constant) of the cache from `place` on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = BYTE if signature.args[0].dtype == types.uint8 else FLOAT
        at = vector.element(context, builder, signature.args[0], args[0], args[1], kind)
        vector.prefetch(builder, at, items.literal_value * (1 if kind == BYTE else 4))
        return context.get_dummy_value()

    return types.void(cache, types.intp, items), generate


@emitted
def score_tokens(
    typing: Any, cache: Any, codes: Any, scales: Any, biases: Any, count: Any, ahead: Any, q: Any, out: Any,
    target: Any, pitch: Any, bits: Any, group: Any, dim: Any, heads: Any,
) -> Any:  # fmt: skip
    """`out[target + h * pitch + t]` = q of head h . key t, for `count` tokens.

    q is `[heads, dim]` in reading order. Products are of codes alone: a key's scale, and its bias times
    the sum of q, come in behind. As many tokens from place `ahead` on will be read next.
    """
    heads_ = heads.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cache_, codes_, scales_, biases_, count_, ahead_, q_, out_, target_, pitch_, *_ = args
        kinds, word = signature.args, count_.type
        side = _Side(context, builder, (kinds[0], cache_), [codes_, scales_, biases_], [bits, group, dim])
        q_at = vector.element(context, builder, kinds[6], q_, word(0), FLOAT)
        out_at = vector.element(context, builder, kinds[7], out_, target_, FLOAT)
        chunks = range(side.dim // side.chunk)
        sums_of_q = [
            [
                vector.total(
                    builder,
                    vector.load(
                        builder,
                        vector.offset(builder, q_at, word(head * side.dim + number * side.chunk), FLOAT),
                        side.chunk,
                    ),
                )
                for number in range(side.groups)
            ]
            for head in range(heads_)
        ]

        def products(token: Any) -> list[list[Any]]:
            """For each head and group (one in all, where there are none), lanes whose total is wanted."""
            side.prefetch(ahead_, token)
            sums: list[list[Any]] = [[None] * max(1, side.groups) for _ in range(heads_)]
            for number in chunks:
                slot = number if side.groups else 0
                for start, key in side.pieces(token, number):
                    for head in range(heads_):
                        place = word(head * side.dim + number * side.chunk + start)
                        part = vector.load(
                            builder, vector.offset(builder, q_at, place, FLOAT), key.type.count
                        )
                        before = sums[head][slot]
                        sums[head][slot] = (
                            builder.fmul(key, part)
                            if before is None
                            else vector.multiply_add(builder, key, part, before)
                        )
            return sums

        def score(token: Any, tokens: int, head: int, found: list[Any]) -> Any:
            """A vector of scores from each group's totals."""
            if not side.groups:
                return found[0]
            result = None
            for number, total in enumerate(found):
                scale, bias = side.scales_of(token, tokens, number)
                whole = vector.splat(builder, sums_of_q[head][number], tokens)
                rest = (
                    builder.fmul(bias, whole)
                    if result is None
                    else vector.multiply_add(builder, bias, whole, result)
                )
                result = vector.multiply_add(builder, total, scale, rest)
            return result

        def place(head: int, token: Any) -> Any:
            return vector.offset(builder, out_at, builder.add(builder.mul(pitch_, word(head)), token), FLOAT)

        fours = builder.and_(count_, word(-4))
        with vector.loop(builder, word(0), builder.sdiv(fours, word(4))) as turn:
            token = builder.mul(turn, word(4))
            found = [products(builder.add(token, word(step))) for step in range(4)]
            for head in range(heads_):
                totals = [
                    vector.totals(builder, [sums[head][slot] for sums in found])
                    for slot in range(max(1, side.groups))
                ]
                vector.store(builder, score(token, 4, head, totals), place(head, token))
        with vector.loop(builder, fours, count_) as token:
            for head, sums in enumerate(products(token)):
                totals = [vector.splat(builder, vector.total(builder, lanes), 1) for lanes in sums]
                vector.store(builder, score(token, 1, head, totals), place(head, token))
        return context.get_dummy_value()

    whole = (types.intp,) * 5
    return types.void(cache, *whole, q, out, types.intp, types.intp, bits, group, dim, heads), generate


@emitted
def weigh_values(
    typing: Any, cache: Any, codes: Any, scales: Any, biases: Any, count: Any, ahead: Any, p: Any, first: Any,
    pitch: Any, out: Any, target: Any, bits: Any, group: Any, dim: Any, heads: Any,
) -> Any:  # fmt: skip
    """`out[target:] += sum over t of p[first + h * pitch + t] * value t`, `[heads, dim]` in reading order.

    Codes are weighed with p * scale, which takes the place of p, group by group; the sum of p * bias is added
    to all lanes. As many tokens from place `ahead` on will be read next.
    """
    heads_ = heads.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cache_, codes_, scales_, biases_, count_, ahead_, p_, first_, pitch_, out_, target_, *_ = args
        kinds, word = signature.args, count_.type
        side = _Side(context, builder, (kinds[0], cache_), [codes_, scales_, biases_], [bits, group, dim])
        p_at = vector.element(context, builder, kinds[6], p_, first_, FLOAT)
        out_at = vector.element(context, builder, kinds[9], out_, target_, FLOAT)
        scaled = cgutils.alloca_once(builder, ir.ArrayType(FLOAT, heads_ * BLOCK_TOKENS))

        def weight_at(head: int, token: Any) -> Any:
            """Where a token's weight lies: p, or p * scale of the group in work."""
            if side.groups:
                index = builder.add(word(head * BLOCK_TOKENS), token)
                return vector.offset(builder, scaled, index, FLOAT)
            return vector.offset(builder, p_at, builder.add(builder.mul(pitch_, word(head)), token), FLOAT)

        def scale_weights(number: int) -> list[Any]:
            """Fill `scaled` for a group; returns each head's sum of p * bias."""
            fours, ones = Registers(builder, heads_, 4), Registers(builder, heads_, 1)
            fours.clear()
            ones.clear()

            def some(token: Any, tokens: int, sums: Registers) -> None:
                scale, bias = side.scales_of(token, tokens, number)
                for head in range(heads_):
                    index = builder.add(builder.mul(pitch_, word(head)), token)
                    weight = vector.load(builder, vector.offset(builder, p_at, index, FLOAT), tokens)
                    vector.store(builder, builder.fmul(weight, scale), weight_at(head, token))
                    sums[head] = vector.multiply_add(builder, weight, bias, sums[head])

            whole = builder.sdiv(count_, word(4))
            with vector.loop(builder, word(0), whole) as turn:
                some(builder.mul(turn, word(4)), 4, fours)
            with vector.loop(builder, builder.mul(whole, word(4)), count_) as token:
                some(token, 1, ones)
            return [
                builder.fadd(vector.total(builder, fours[head]), builder.extract_element(ones[head], INT(0)))
                for head in range(heads_)
            ]

        for number in range(side.dim // side.chunk):
            shifts = scale_weights(number) if side.groups else []
            starts = side.starts
            lanes = min(LANES, side.chunk)
            for begin in range(0, heads_, TOGETHER):
                some = range(begin, min(begin + TOGETHER, heads_))
                lines = [
                    vector.offset(builder, out_at, word(head * side.dim + number * side.chunk + start), FLOAT)
                    for head in some
                    for start in starts
                ]
                sums = Registers(builder, len(lines), lanes)
                for slot, line in enumerate(lines):
                    value = vector.load(builder, line, lanes)
                    if side.groups:
                        shift = vector.splat(builder, shifts[some[slot // len(starts)]], lanes)
                        value = builder.fadd(value, shift)
                    sums[slot] = value
                with vector.loop(builder, word(0), count_) as token:
                    if number == begin == 0:
                        side.prefetch(ahead_, token)
                    pieces = [piece for _, piece in side.pieces(token, number)]
                    for turn, head in enumerate(some):
                        weight = builder.load(weight_at(head, token), align=4)
                        weight = vector.splat(builder, weight, lanes)
                        for part, piece in enumerate(pieces):
                            slot = turn * len(pieces) + part
                            sums[slot] = vector.multiply_add(builder, piece, weight, sums[slot])
                for slot, line in enumerate(lines):
                    vector.store(builder, sums[slot], line)
        return context.get_dummy_value()

    whole = (types.intp,) * 5
    constants = (bits, group, dim, heads)
    return types.void(cache, *whole, p, types.intp, types.intp, out, types.intp, *constants), generate


@emitted
def expand_tokens(
    typing: Any, cache: Any, codes: Any, scales: Any, biases: Any, count: Any, out: Any, target: Any,
    pitch: Any, bits: Any, group: Any, dim: Any,
) -> Any:  # fmt: skip
    """`count` tokens as float32 in their own order, `out` rows `pitch` apart from `target` on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cache_, codes_, scales_, biases_, count_, out_, target_, pitch_, *_ = args
        kinds, word = signature.args, count_.type
        side = _Side(context, builder, (kinds[0], cache_), [codes_, scales_, biases_], [bits, group, dim])
        out_at = vector.element(context, builder, kinds[5], out_, target_, FLOAT)
        with vector.loop(builder, word(0), count_) as token:
            for number in range(side.dim // side.chunk):
                value = side.read(token, number)
                if side.bits == 4:
                    value = vector.interleave(builder, value)
                index = builder.add(builder.mul(token, pitch_), word(number * side.chunk))
                vector.store(builder, value, vector.offset(builder, out_at, index, FLOAT))
        return context.get_dummy_value()

    whole = (types.intp,) * 4
    return types.void(cache, *whole, out, types.intp, types.intp, bits, group, dim), generate


@emitted
def put_token(
    typing: Any, values: Any, first: Any, cache: Any, codes: Any, scales: Any, biases: Any,
    bits: Any, group: Any, dim: Any,
) -> Any:  # fmt: skip
    """Store one head's K or V: quantized as `quant.affine.quantize` defines it, or as it is (`bits` 0)."""
    bits_, dim_ = bits.literal_value, dim.literal_value
    chunk = chunk_of(dim_, bits_, group.literal_value)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values_, first_, cache_, *places, _bits, _group, _dim = args
        kinds, word = signature.args, first_.type
        item = BYTE if bits_ else FLOAT
        x_at = vector.element(context, builder, kinds[0], values_, first_, FLOAT)
        codes_at, *pair_at = (
            vector.element(context, builder, kinds[2], cache_, place, item) for place in places
        )
        for number in range(dim_ // chunk):
            x = vector.load(builder, vector.offset(builder, x_at, word(number * chunk), FLOAT), chunk)
            if not bits_:
                vector.store(builder, x, vector.offset(builder, codes_at, word(number * chunk), FLOAT))
                continue
            octets, pair = _quantize(builder, x, bits_)
            for value, place in zip(pair, pair_at, strict=True):
                builder.store(value, vector.offset(builder, place, word(number), HALF), align=2)
            at = vector.offset(builder, codes_at, word(number * octets.type.count), BYTE)
            builder.store(octets, builder.bitcast(at, octets.type.as_pointer()), align=1)
        return context.get_dummy_value()

    whole = (types.intp,) * 3
    return types.void(values, types.intp, cache, *whole, bits, group, dim), generate


def _quantize(builder: Any, x: Any, bits: int) -> tuple[Any, list[Any]]:
    """The packed codes of one group, and its scale and bias as float16; NaN goes into these."""
    lanes, kind, top = x.type.count, x.type, FLOAT(float(2**bits - 1))
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
    octets = builder.trunc(builder.fptosi(rounded, ir.VectorType(INT, lanes)), ir.VectorType(BYTE, lanes))
    if bits == 4:
        half = lanes // 2
        even, odd = (
            builder.shuffle_vector(
                octets,
                octets,
                ir.Constant(ir.VectorType(INT, half), [INT(2 * lane + side) for lane in range(half)]),
            )
            for side in (0, 1)
        )
        octets = builder.or_(even, builder.shl(odd, vector.splat(builder, BYTE(4), half)))
    return octets, pair
