"""Softmax over a stretch of one block's 64 scores, as Numba intrinsics."""

from typing import Any

from numba import types

from kvrelay_kernels.cpu import vector
from kvrelay_kernels.cpu.vector import FLOAT, emitted
from kvrelay_kernels.quant import BLOCK_TOKENS


@emitted
def largest(typing: Any, scores: Any, first: Any) -> Any:
    """The largest of 64 scores from `first` on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = vector.element(context, builder, signature.args[0], args[0], args[1], FLOAT)
        return vector.extreme(builder, vector.load(builder, at, BLOCK_TOKENS), "fmax")

    return types.float32(scores, types.intp), generate


@emitted
def exponentials(typing: Any, scores: Any, first: Any, scale: Any, top: Any) -> Any:
    """Replace 64 scores from `first` on by e^(score * scale - top); returns their sum. -inf becomes 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = vector.element(context, builder, signature.args[0], args[0], args[1], FLOAT)
        scale_, below = vector.splat(builder, args[2], BLOCK_TOKENS), builder.fneg(args[3])
        score = vector.load(builder, at, BLOCK_TOKENS)
        shifted = vector.multiply_add(builder, score, scale_, vector.splat(builder, below, BLOCK_TOKENS))
        weight = vector.exponential(builder, shifted)
        vector.store(builder, weight, at)
        return vector.total(builder, weight)

    return types.float32(scores, types.intp, types.float32, types.float32), generate
