"""Every cache format has its readers and its writer on CUDA; what no kernel runs is refused by name."""

from dataclasses import replace

import pytest

from kvrelay_kernels.cuda.decode_attention import (
    HEAD_DIMS,
    MANY_HEADS,
    SHARED_BYTES,
    DecodeProblem,
    launch_shape,
)
from kvrelay_kernels.cuda.expand import Expansion
from kvrelay_kernels.cuda.rope import AppendShape
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import AttentionSpec
from kvrelay_kernels.quant import BlockLayout, parse_format
from kvrelay_kernels.quant.formats import KNOWN

SMALLER = (162 << 10, 98 << 10)
"""Shared memory for a thread block on compute capabilities 8.0 and 8.9 (and 12.0)."""


def layout_of(name: str, head_dim: int) -> BlockLayout:
    return BlockLayout(parse_format(name, head_dim, "bfloat16"), 2, head_dim)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", KNOWN)
def test_all_formats_are_served(name: str, head_dim: int) -> None:
    layout, spec = layout_of(name, head_dim), AttentionSpec(8, 2, head_dim, 0.1)
    AppendShape(layout, 8, head_dim, False, "bfloat16")
    Expansion(layout, "bfloat16")
    for rows in (1, 4):
        problem = DecodeProblem(layout, spec, "bfloat16", rows)
        shape = launch_shape(problem)
        assert shape.warps >= 4
        assert problem.shared_bytes(shape) <= SHARED_BYTES
        many = launch_shape(problem, sequences=MANY_HEADS)
        assert shape.side == 1
        assert replace(many, side=1) == shape
        for shared_limit in SMALLER:
            fitting = launch_shape(problem, shared_limit, sequences=MANY_HEADS)
            assert problem.shared_bytes(fitting) <= shared_limit
            assert replace(fitting, warps=shape.warps, side=1) == shape
            assert fitting.warps % fitting.side == spec.kv_heads % fitting.side == 0
        with pytest.raises(FormatUnsupported, match="bytes of shared memory; the GPU has 4096"):
            launch_shape(problem, 4096)


def test_what_does_not_fit_together_is_refused() -> None:
    spec = AttentionSpec(8, 2, 128, 0.1)
    with pytest.raises(FormatUnsupported, match="head dimensions"):
        DecodeProblem(layout_of("int8-g32", 160), AttentionSpec(8, 2, 160, 0.1), "bfloat16")
    with pytest.raises(FormatUnsupported, match="query rows"):
        DecodeProblem(layout_of("nvfp4", 128), spec, "bfloat16", 33)
    with pytest.raises(FormatUnsupported, match="does not go with"):
        DecodeProblem(layout_of("none", 128), spec, "float16")
    with pytest.raises(FormatUnsupported, match="does not fit"):
        DecodeProblem(layout_of("turbo3", 64), spec, "bfloat16")
