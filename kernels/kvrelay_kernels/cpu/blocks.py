"""Reading and writing KV blocks, as Numba intrinsics.

`cache` is the arena as one flat array, bytes for codes and float32 for unquantized blocks; places in it are
counted in its items. `name` (of the format), `dim` and `heads` are constants. A key is widened in registers,
once for all query heads that share it.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvrelay_kernels.cpu import vector
from kvrelay_kernels.cpu.forms import LANES, form_of
from kvrelay_kernels.cpu.vector import BYTE, FLOAT, INT, Registers, emitted
from kvrelay_kernels.quant import BLOCK_TOKENS

TOGETHER = 4
"""Query heads whose sums are held in registers at once."""


class _Side:
    """Where one kv head's K or V of a block lies, and how to read token by token."""

    def __init__(
        self, context: Any, builder: Any, cache: tuple[Any, Any], at: list[Any], consts: list[Any]
    ) -> None:
        name, self.dim = (const.literal_value for const in consts)
        self.form = form_of(name, self.dim)
        self.chunk, self.groups = self.form.chunk, self.form.groups
        self.builder, self.word = builder, at[0].type
        kind, array = cache
        self.start = vector.element(context, builder, kind, array, at[0].type(0), self.form.item)
        self.codes, self.scales, self.biases = (
            vector.element(context, builder, kind, array, place, self.form.item) for place in at
        )

    def prefetch(self, ahead: Any, token: Any) -> None:
        """Ask for token `token` of the ones from place `ahead` of the cache on."""
        builder, item = self.builder, self.form.item
        index = builder.add(ahead, builder.mul(token, self.word(self.form.row)))
        size = self.form.row if item == BYTE else 4 * self.form.row
        vector.prefetch(builder, vector.offset(builder, self.start, index, item), size)

    @property
    def chunks(self) -> range:
        """Numbers of a token's chunks."""
        return range(self.dim // self.chunk)

    def group_of(self, number: int) -> int:
        """Which of a token's groups chunk `number` is in; 0 where no scale comes behind the product."""
        return number * self.chunk // self.form.group if self.groups else 0

    def pieces(self, token: Any, number: int) -> list[Any]:
        """Chunk `number` of a token in vectors of float32; see `Form.pieces`."""
        builder, word, form = self.builder, self.word, self.form
        at, scales_at = (
            vector.offset(
                builder,
                side,
                builder.add(builder.mul(token, word(size)), word(size * number // len(self.chunks))),
                form.item,
            )
            for side, size in ((self.codes, form.row), (self.scales, form.scale_bytes))
        )
        return form.pieces(builder, at, scales_at)

    def scales_of(self, token: Any, tokens: int, group: int) -> tuple[Any, Any]:
        """Scales of a group of some neighbouring tokens, and their biases as elements are read, or None."""
        builder, form = self.builder, self.form
        order = [turn * self.groups + group for turn in range(tokens)]

        def stored(side: Any) -> Any:
            at = vector.offset(builder, side, builder.mul(token, self.word(form.scale_bytes)), BYTE)
            every = form.scales(builder, at, tokens * self.groups)
            return vector.shuffled(builder, every, every, order)

        scale = stored(self.scales)
        return scale, form.bias(builder, scale, stored(self.biases)) if form.biased else None

    def read(self, token: Any, number: int) -> Any:
        """Chunk `number` of a token as float32, in its own order."""
        builder = self.builder
        pieces = sorted(zip(self.form.starts, self.pieces(token, number), strict=True), key=_start)
        values = vector.joined(builder, [value for _, value in pieces])
        if not self.form.in_order:
            values = vector.interleave(builder, values)
        if not self.groups:
            return values
        scale, bias = self.scales_of(token, 1, self.group_of(number))
        scale = vector.lane(builder, scale, 0, self.chunk)
        if bias is None:
            return builder.fmul(values, scale)
        return vector.multiply_add(builder, values, scale, vector.lane(builder, bias, 0, self.chunk))


def _start(piece: tuple[int, Any]) -> int:
    return piece[0]


@emitted
def reorder(
    typing: Any, x: Any, first: Any, factor: Any, out: Any, target: Any, inward: Any, name: Any, dim: Any
) -> Any:
    """One head times `factor`, from its own order into reading order if `inward` (a constant), else back."""
    inward_, dim_ = inward.literal_value, dim.literal_value
    form = form_of(name.literal_value, dim_)
    turn = vector.separate if inward_ else vector.interleave

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_, first_, factor_, out_, target_, *_ = args
        kinds, word = signature.args, first_.type
        x_at = vector.element(context, builder, kinds[0], x_, first_, FLOAT)
        out_at = vector.element(context, builder, kinds[3], out_, target_, FLOAT)
        for start in range(0, dim_, form.chunk):
            value = vector.load(builder, vector.offset(builder, x_at, word(start), FLOAT), form.chunk)
            value = builder.fmul(value, vector.splat(builder, factor_, form.chunk))
            value = value if form.in_order else turn(builder, value)
            vector.store(builder, value, vector.offset(builder, out_at, word(start), FLOAT))
        return context.get_dummy_value()

    places = (out, types.intp, inward, name, dim)
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
    target: Any, pitch: Any, name: Any, dim: Any, heads: Any,
) -> Any:  # fmt: skip
    """`out[target + h * pitch + t]` = q of head h . key t, for `count` tokens.

    q is `[heads, dim]` in reading order. Products are of codes alone: a key's scale, and its bias times
    the sum of q, come in behind. As many tokens from place `ahead` on will be read next.
    """
    heads_ = heads.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cache_, codes_, scales_, biases_, count_, ahead_, q_, out_, target_, pitch_, *_ = args
        kinds, word = signature.args, count_.type
        side = _Side(context, builder, (kinds[0], cache_), [codes_, scales_, biases_], [name, dim])
        q_at = vector.element(context, builder, kinds[6], q_, word(0), FLOAT)
        out_at = vector.element(context, builder, kinds[7], out_, target_, FLOAT)
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
                for number in (side.chunks if side.form.biased else ())
            ]
            for head in range(heads_)
        ]

        def products(token: Any) -> list[list[Any]]:
            """For each head and group (one in all, where there are none), lanes whose total is wanted."""
            side.prefetch(ahead_, token)
            sums: list[list[Any]] = [[None] * max(1, side.groups) for _ in range(heads_)]
            for number in side.chunks:
                slot = side.group_of(number)
                for start, key in zip(side.form.starts, side.pieces(token, number), strict=True):
                    for head in range(heads_):
                        place = word(head * side.dim + number * side.chunk + start)
                        part = vector.load(
                            builder, vector.offset(builder, q_at, place, FLOAT), key.type.count
                        )
                        sums[head][slot] = vector.multiply_add(builder, key, part, sums[head][slot])
            return sums

        def score(token: Any, tokens: int, head: int, found: list[Any]) -> Any:
            """A vector of scores from each group's totals."""
            if not side.groups:
                return found[0]
            result = None
            for number, total in enumerate(found):
                scale, bias = side.scales_of(token, tokens, number)
                rest = result
                if bias is not None:
                    whole = vector.splat(builder, sums_of_q[head][number], tokens)
                    rest = vector.multiply_add(builder, bias, whole, result)
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
    return types.void(cache, *whole, q, out, types.intp, types.intp, name, dim, heads), generate


@emitted
def weigh_values(
    typing: Any, cache: Any, codes: Any, scales: Any, biases: Any, count: Any, ahead: Any, p: Any, first: Any,
    pitch: Any, out: Any, target: Any, name: Any, dim: Any, heads: Any,
) -> Any:  # fmt: skip
    """`out[target:] += sum over t of p[first + h * pitch + t] * value t`, `[heads, dim]` in reading order.

    Codes are weighed with p * scale, which takes the place of p, group by group; the sum of p * bias is added
    to all lanes. As many tokens from place `ahead` on will be read next.
    """
    heads_ = heads.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cache_, codes_, scales_, biases_, count_, ahead_, p_, first_, pitch_, out_, target_, *_ = args
        kinds, word = signature.args, count_.type
        side = _Side(context, builder, (kinds[0], cache_), [codes_, scales_, biases_], [name, dim])
        p_at = vector.element(context, builder, kinds[6], p_, first_, FLOAT)
        out_at = vector.element(context, builder, kinds[9], out_, target_, FLOAT)
        scaled = cgutils.alloca_once(builder, ir.ArrayType(FLOAT, heads_ * BLOCK_TOKENS))

        def weight_at(head: int, token: Any) -> Any:
            """Where a token's weight lies: p, or p * scale of the group in work."""
            if side.groups:
                index = builder.add(word(head * BLOCK_TOKENS), token)
                return vector.offset(builder, scaled, index, FLOAT)
            return vector.offset(builder, p_at, builder.add(builder.mul(pitch_, word(head)), token), FLOAT)

        def scale_weights(group: int) -> list[Any]:
            """Fill `scaled` for a group; returns each head's sum of p * bias, where there are biases."""
            fours, ones = Registers(builder, heads_, 4), Registers(builder, heads_, 1)
            fours.clear()
            ones.clear()

            def some(token: Any, tokens: int, sums: Registers) -> None:
                scale, bias = side.scales_of(token, tokens, group)
                for head in range(heads_):
                    index = builder.add(builder.mul(pitch_, word(head)), token)
                    weight = vector.load(builder, vector.offset(builder, p_at, index, FLOAT), tokens)
                    vector.store(builder, builder.fmul(weight, scale), weight_at(head, token))
                    if bias is not None:
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

        starts = side.form.starts
        lanes = min(LANES, side.chunk)
        for number in side.chunks:
            shifts = list[Any]()
            if side.groups and number * side.chunk % side.form.group == 0:
                shifts = scale_weights(side.group_of(number))
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
                    if side.form.biased:
                        shift = vector.splat(builder, shifts[some[slot // len(starts)]], lanes)
                        value = builder.fadd(value, shift)
                    sums[slot] = value
                with vector.loop(builder, word(0), count_) as token:
                    if number == begin == 0:
                        side.prefetch(ahead_, token)
                    pieces = side.pieces(token, number)
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
    constants = (name, dim, heads)
    return types.void(cache, *whole, p, types.intp, types.intp, out, types.intp, *constants), generate


@emitted
def expand_tokens(
    typing: Any, cache: Any, codes: Any, scales: Any, biases: Any, count: Any, out: Any, target: Any,
    pitch: Any, name: Any, dim: Any,
) -> Any:  # fmt: skip
    """`count` tokens as float32 in their own order, `out` rows `pitch` apart from `target` on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cache_, codes_, scales_, biases_, count_, out_, target_, pitch_, *_ = args
        kinds, word = signature.args, count_.type
        side = _Side(context, builder, (kinds[0], cache_), [codes_, scales_, biases_], [name, dim])
        out_at = vector.element(context, builder, kinds[5], out_, target_, FLOAT)
        with vector.loop(builder, word(0), count_) as token:
            for number in side.chunks:
                value = side.read(token, number)
                index = builder.add(builder.mul(token, pitch_), word(number * side.chunk))
                vector.store(builder, value, vector.offset(builder, out_at, index, FLOAT))
        return context.get_dummy_value()

    whole = (types.intp,) * 4
    return types.void(cache, *whole, out, types.intp, types.intp, name, dim), generate


@emitted
def put_token(
    typing: Any, values: Any, first: Any, cache: Any, codes: Any, scales: Any, biases: Any,
    name: Any, dim: Any,
) -> Any:  # fmt: skip
    """Store one head's K or V: quantized as `quant.codec` defines it, or as it is."""
    dim_ = dim.literal_value
    form = form_of(name.literal_value, dim_)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values_, first_, cache_, *places, _name, _dim = args
        kinds, word = signature.args, first_.type
        x_at = vector.element(context, builder, kinds[0], values_, first_, FLOAT)
        codes_at, *scales_at = (
            vector.element(context, builder, kinds[2], cache_, place, form.item) for place in places
        )
        for number in range(dim_ // form.group):
            place = vector.offset(builder, x_at, word(number * form.group), FLOAT)
            items, stored = form.encode(builder, vector.load(builder, place, form.group))
            for value, side in zip(stored, scales_at, strict=False):
                builder.store(value, vector.offset(builder, side, word(number), value.type), align=1)
            at = vector.offset(builder, codes_at, word(number * items.type.count), form.item)
            builder.store(items, builder.bitcast(at, items.type.as_pointer()), align=1)
        return context.get_dummy_value()

    whole = (types.intp,) * 3
    return types.void(values, types.intp, cache, *whole, name, dim), generate
