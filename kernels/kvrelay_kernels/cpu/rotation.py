"""The rotation of keys and queries, in registers."""

from typing import Any

from llvmlite import ir
from numba import types

from kvrelay_kernels.cpu import vector
from kvrelay_kernels.cpu.vector import FLOAT, INT, emitted
from kvrelay_kernels.quant.rotation import run_length


@emitted
def rotate(typing: Any, x: Any, first: Any, dim: Any) -> Any:
    """`quant.rotation.rotate` of the head from element `first` of x on, in place. `dim` is a constant."""
    dim_ = dim.literal_value
    run = run_length(dim_)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = vector.element(context, builder, signature.args[0], args[0], args[1], FLOAT)
        kind = ir.VectorType(FLOAT, run)
        for start in range(0, dim_, run):
            place = vector.offset(builder, at, args[1].type(start), FLOAT)
            value, step = vector.load(builder, place, run), 1
            while step < run:
                order = ir.Constant(ir.VectorType(INT, run), [INT(lane ^ step) for lane in range(run)])
                partner = builder.shuffle_vector(value, value, order)
                signs = ir.Constant(kind, [FLOAT(-1.0 if lane & step else 1.0) for lane in range(run)])
                value = vector.multiply_add(builder, value, signs, partner)
                step *= 2
            vector.store(builder, builder.fmul(value, ir.Constant(kind, [FLOAT(run**-0.5)] * run)), place)
        return context.get_dummy_value()

    return types.void(x, types.intp, dim), generate
