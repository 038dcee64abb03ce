"""The split-K decode kernel against float64 attention over the values its codes stand for."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cuda.decode_attention import DecodeAttention, DecodeProblem, Element16
from kvrelay_kernels.cuda.module import KernelCache
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import AttentionSpec
from kvrelay_kernels.quant import BlockLayout, parse_format
from tests.gpu.paged_cache import DTYPES, PagedCache, exact_attention, random_cache

HEADS = {64: (9, 3), 96: (12, 4), 128: (32, 8), 256: (16, 2)}
FORMATS = ["none", "int8-g64", "int8-g32", "int6-g64", "int6-g32", "int4-g64", "int4-g32"]
FORMATS += ["mxfp8", "mxfp4", "nvfp4", "turbo4", "turbo3"]
KINDS = ["none", "int8-g64", "int6-g32", "int4-g32", "mxfp8", "mxfp4", "nvfp4", "turbo4", "turbo3"]
"""One of each kind of kernel."""
RAGGED = [1, 0, 63, 64, 65, 200, 1337, 5000]
BOUND = 2e-3


def make(
    fmt: str, head_dim: int, element: Element16, rows: int = 1, window: int | None = None, heads: Any = None
) -> DecodeProblem:
    total, kv = heads or HEADS[head_dim]
    layout = BlockLayout(parse_format(fmt, head_dim, element), kv, head_dim)
    return DecodeProblem(layout, AttentionSpec(total, kv, head_dim, head_dim**-0.5, window), element, rows)


def run(cupy: Any, kernels: KernelCache, problem: DecodeProblem, cache: PagedCache, q: Any) -> Any:
    """The kernel's output as float32, from a poisoned buffer."""
    operation = DecodeAttention(problem, len(cache.lengths), kernels)
    out = cupy.full(q.shape, 0xFFFF, np.uint16)
    operation.attach(cupy.asarray(np.stack([np.full_like(cache.arena, 0xFF), cache.arena])))
    operation.plan(cupy.asarray(cache.lengths))
    operation(cupy.asarray(q.view(np.uint16)), 1, cupy.asarray(cache.tables), out)
    return out.get().view(q.dtype).astype(np.float32)


def relative_error(got: Any, want: Any) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def bound(want: NDArray[np.float64], element: Element16) -> float:
    """What a result may be off by: `BOUND`, or a twentieth more than its own rounding where that costs more.

    A few levels of one token make up a whole sequence of one: there rounding may lose up to 2^-8.
    """
    return max(BOUND, 1.05 * relative_error(want.astype(DTYPES[element]).astype(np.float64), want))


def check(cupy: Any, kernels: KernelCache, problem: DecodeProblem, lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = random_cache(rng, problem.layout, lengths)
    shape = (len(lengths) * problem.rows, problem.spec.heads, problem.spec.head_dim)
    q = rng.standard_normal(shape).astype(DTYPES[problem.element])
    want = exact_attention(q, cache, problem.spec, problem.rows)
    got = run(cupy, kernels, problem, cache, q)
    assert np.isfinite(got).all()
    for s, length in enumerate(lengths):
        rows = slice(s * problem.rows, (s + 1) * problem.rows)
        if length == 0:
            assert not got[rows].any()
        else:
            assert relative_error(got[rows], want[rows]) < 2 * BOUND, f"sequence {s}"
    assert relative_error(got, want) < bound(want, problem.element)


@pytest.mark.parametrize("head_dim", HEADS)
@pytest.mark.parametrize("element", ["bfloat16", "float16"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_ragged_batch(cupy: Any, kernels: KernelCache, fmt: str, element: Element16, head_dim: int) -> None:
    if head_dim == 96 and fmt.endswith("g64"):
        pytest.skip("a group of 64 does not divide 96")
    check(cupy, kernels, make(fmt, head_dim, element), RAGGED, seed=head_dim)


@pytest.mark.parametrize("window", [1, 63, 300])
@pytest.mark.parametrize("fmt", KINDS)
def test_sliding_window(cupy: Any, kernels: KernelCache, fmt: str, window: int) -> None:
    check(cupy, kernels, make(fmt, 128, "bfloat16", window=window), RAGGED, seed=window)


@pytest.mark.parametrize("rows", [2, 3, 5, 32])
@pytest.mark.parametrize("fmt", KINDS)
@pytest.mark.parametrize("window", [None, 70])
def test_several_rows(cupy: Any, kernels: KernelCache, fmt: str, rows: int, window: int | None) -> None:
    lengths = [rows, rows + 1, 64 + rows, 640, 3000]
    check(cupy, kernels, make(fmt, 128, "bfloat16", rows, window), lengths, seed=rows)


@pytest.mark.parametrize("head_dim", HEADS)
@pytest.mark.parametrize("fmt", ["int8-g32", "int6-g32", "mxfp4", "nvfp4", "turbo3"])
def test_rows_and_window_at_every_head_dimension(
    cupy: Any, kernels: KernelCache, fmt: str, head_dim: int
) -> None:
    check(cupy, kernels, make(fmt, head_dim, "float16", 4, 100), [4, 77, 1000], seed=head_dim)


def test_frames_between_boxes(cupy: Any, kernels: KernelCache) -> None:
    """Three groups of an odd number of heads: values begin where no box of the copy engine does."""
    check(cupy, kernels, make("mxfp8", 96, "bfloat16", heads=(3, 1)), [70, 1, 2000], seed=3)


@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp4"])
@pytest.mark.parametrize("rise", [0.25, -0.25])
def test_powers_of_two_far_from_one(cupy: Any, kernels: KernelCache, fmt: str, rise: float) -> None:
    """Values that grow or shrink by 2^75 along a sequence, one in five of them zero."""

    def change(x: NDArray[np.float32], side: str) -> NDArray[np.float32]:
        at = np.arange(len(x))
        sizes = np.where(at % 5, 2.0 ** (rise * (at - 150)), 0).astype(np.float32)
        return x * sizes[:, None, None] if side == "v" else x

    problem = make(fmt, 128, "bfloat16")
    rng = np.random.default_rng(6)
    cache = random_cache(rng, problem.layout, [300, 300], change)
    q = rng.standard_normal((2, 32, 128)).astype(DTYPES["bfloat16"])
    got = run(cupy, kernels, problem, cache, q)
    assert relative_error(got, exact_attention(q, cache, problem.spec, 1)) < 2 * BOUND


@pytest.mark.parametrize("side", "kv")
@pytest.mark.parametrize("fmt", KINDS)
def test_what_is_not_a_number_shows(cupy: Any, kernels: KernelCache, fmt: str, side: str) -> None:
    """In the sequence that holds it, and in no other."""

    def change(x: NDArray[np.float32], here: str) -> NDArray[np.float32]:
        if here == side and len(x) == 130:
            x[77, 0, 5] = np.nan
        return x

    problem = make(fmt, 128, "bfloat16")
    rng = np.random.default_rng(4)
    cache = random_cache(rng, problem.layout, [64, 130, 900], change)
    q = rng.standard_normal((3, 32, 128)).astype(DTYPES["bfloat16"])
    got = run(cupy, kernels, problem, cache, q)
    assert np.isfinite(got[[0, 2]]).all()
    assert not np.isfinite(got[1, 0, 5])


@pytest.mark.parametrize("heads", [(8, 8), (7, 1), (16, 1), (40, 2)])
def test_query_heads_per_kv_head(cupy: Any, kernels: KernelCache, heads: tuple[int, int]) -> None:
    check(cupy, kernels, make("int8-g64", 128, "bfloat16", heads=heads), [300, 2, 900], seed=heads[0])


@pytest.mark.parametrize("fmt", FORMATS)
def test_long_sequence(cupy: Any, kernels: KernelCache, fmt: str) -> None:
    """Weighted sums of 131072 standard normal values nearly cancel: a lost bit shows here first."""
    check(cupy, kernels, make(fmt, 128, "bfloat16", heads=(4, 1)), [131072], seed=1)


def test_large_batch(cupy: Any, kernels: KernelCache) -> None:
    lengths = np.random.default_rng(5).integers(0, 400, 300).tolist()
    check(cupy, kernels, make("int8-g64", 64, "bfloat16"), lengths, seed=5)


def test_extreme_scores(cupy: Any, kernels: KernelCache) -> None:
    """Scores of thousands, rising along the sequence: the running maximum has to move many times."""
    problem = make("int8-g64", 128, "bfloat16")
    rng = np.random.default_rng(8)
    cache = random_cache(rng, problem.layout, [2000, 500])
    q = (100 * rng.standard_normal((2, 32, 128))).astype(DTYPES["bfloat16"])
    got = run(cupy, kernels, problem, cache, q)
    assert relative_error(got, exact_attention(q, cache, problem.spec, 1)) < 5e-3


@pytest.mark.parametrize("fmt", KINDS)
def test_same_input_same_bits(cupy: Any, kernels: KernelCache, fmt: str) -> None:
    problem = make(fmt, 128, "bfloat16")
    rng = np.random.default_rng(9)
    cache = random_cache(rng, problem.layout, RAGGED)
    q = rng.standard_normal((len(RAGGED), 32, 128)).astype(DTYPES["bfloat16"])
    first = run(cupy, kernels, problem, cache, q)
    assert all(np.array_equal(run(cupy, kernels, problem, cache, q), first) for _ in range(20))


@pytest.mark.parametrize("heads", [(32, 8), (4, 1)])
def test_launches_in_a_row(cupy: Any, kernels: KernelCache, heads: tuple[int, int]) -> None:
    """They overlap, and hand over partial sums through memory that is the same for all."""
    problem = make("int8-g64", 128, "bfloat16", heads=heads)
    rng = np.random.default_rng(10)
    cache = random_cache(rng, problem.layout, [9000, 1, 700])
    q = rng.standard_normal((3, heads[0], 128)).astype(DTYPES["bfloat16"])
    operation = DecodeAttention(problem, 3, kernels)
    operation.attach(cupy.asarray(cache.arena[None]))
    outs = cupy.full((300, *q.shape), 0xFFFF, np.uint16)
    arrays = cupy.asarray(q.view(np.uint16)), cupy.asarray(cache.tables)
    operation.plan(cupy.asarray(cache.lengths))
    for out in outs:
        operation(arrays[0], 0, arrays[1], out)
    assert (outs == outs[0]).all()
    got = outs[0].get().view(q.dtype).astype(np.float32)
    assert relative_error(got, exact_attention(q, cache, problem.spec, 1)) < BOUND


def test_refuses_what_it_cannot_run() -> None:
    with pytest.raises(FormatUnsupported, match="head dimensions"):
        make("int8-g32", 160, "bfloat16", heads=(4, 2))
    with pytest.raises(FormatUnsupported, match="query rows"):
        make("int8-g64", 128, "bfloat16", rows=33)
    layout = BlockLayout(parse_format("none", 128, "float16"), 8, 128)
    with pytest.raises(FormatUnsupported, match="does not go with"):
        DecodeProblem(layout, AttentionSpec(32, 8, 128, 0.1), "bfloat16")
