"""The pass over q, k and v: the bytes of quant/ for the same float32 inputs; and turning rows back."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.module import KernelCache
from kvrelay_kernels.cuda.rows import RowKernels
from kvrelay_kernels.interface import RopeTable
from kvrelay_kernels.quant.formats import SCHEMES
from kvrelay_kernels.quant.rotation import rotate
from kvrelay_kernels.reference.backend import ReferenceArena
from tests.gpu.append_case import (
    UNTOUCHED,
    AppendCase,
    differences,
    expected,
    make_case,
    same_bytes,
    with_extremes,
)
from tests.gpu.poisoned import UNIT, error, poisoned, rounded, to_device, to_host

FORMATS = ["none", "int8-g32", "int6-g32", "int4-g32", *SCHEMES]
HEADS = {64: (9, 3, 64), 96: (12, 4, 96), 128: (32, 8, 128), 256: (4, 1, 256)}
STEP = [70, 1, 64, 33], [0, 130, 64, 31]
CODE_FLIPS = {"int8": 2e-3, "int6": 1e-2, "mxfp8": 1e-2}
"""What codes that fall to the other side of a rounding make of a cache; 5e-2 with fewer bits."""


def append(case: AppendCase) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Rows of q and the bytes of layer 1, as the kernel writes them; layer 0 stays as it is."""
    backend = poisoned(case.element)
    arena = backend.new_arena(case.layout, 2, case.blocks)
    arena.bytes.fill(UNTOUCHED)
    table = RopeTable(backend.load_array(case.cos), backend.load_array(case.sin))
    norms = None
    if case.norms is not None:
        norms = backend.load_array(case.norms[0]), backend.load_array(case.norms[1]), case.norms[2]
    qkv = to_device(case.qkv.reshape(case.batch.rows, -1), case.element)
    q = backend.rope_append(qkv, case.batch, arena, 1, case.spec, table, norms)
    found = arena.bytes.get()
    assert (found[0] == UNTOUCHED).all()
    return to_host(q, case.element), found[1]


@pytest.mark.parametrize("head_dim", HEADS)
@pytest.mark.parametrize("element", ["float16", "bfloat16"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_bytes(cupy: Any, fmt: str, element: Element16, head_dim: int) -> None:
    """Of ordinary heads and of those that are hard to code; in float16 a part of each is roped."""
    turned = 32 if element == "float16" else head_dim
    case = with_extremes(make_case(np.random.default_rng(), fmt, HEADS[head_dim], element, *STEP, turned))
    q, layer = append(case)
    queries, wanted = expected(case)
    assert error(q, queries) < UNIT[element]
    assert differences(layer, wanted, case.layout) == []


@pytest.mark.parametrize("head_dim", HEADS)
@pytest.mark.parametrize("element", ["float16", "bfloat16"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_norms(cupy: Any, fmt: str, element: Element16, head_dim: int) -> None:
    """A norm adds its squares up in another order: a code may fall to the other side of a rounding."""
    case = make_case(np.random.default_rng(), fmt, HEADS[head_dim], element, *STEP, normed=True)
    q, layer = append(case)
    queries, wanted = expected(case)
    assert error(q, queries) < UNIT[element]
    assert same_bytes(layer, wanted, case.layout).mean() > 0.95
    bound = 2 * UNIT[element] if fmt == "none" else CODE_FLIPS.get(case.layout.format.base, 5e-2)
    for side in "kv":
        ours, theirs = (stored_values(case, found, side) for found in (layer, wanted))
        assert error(ours, theirs) < bound


@pytest.mark.parametrize("head_dim", HEADS)
@pytest.mark.parametrize("element", ["float16", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 333])
def test_turning_back(cupy: Any, kernels: KernelCache, element: Element16, head_dim: int, rows: int) -> None:
    """Rows are rotated in place, and what lies behind them stays as it is."""
    values = rounded(np.random.default_rng().standard_normal((rows + 1, 3 * head_dim)), element)
    there = to_device(values, element)
    RowKernels(element, kernels).rotate(there[:rows], head_dim)
    wanted = rounded(rotate(values[:rows].reshape(-1, head_dim)).reshape(rows, -1), element)
    assert np.array_equal(to_host(there, element), np.concatenate([wanted, values[rows:]]))


def stored_values(case: AppendCase, layer: NDArray[np.uint8], side: str) -> NDArray[np.float64]:
    """What this step has written, one sequence behind the other."""
    arena, batch = ReferenceArena(case.layout, 1, case.blocks), case.batch
    for block in range(case.blocks):
        arena.write_block(0, block, memoryview(layer[block].tobytes()))
    rows = [
        arena.get(0, table, int(length), side)[:, length - count :]
        for table, length, count in zip(
            batch.block_tables, batch.lengths, np.diff(batch.row_starts), strict=True
        )
    ]
    return np.concatenate(rows, 1)
