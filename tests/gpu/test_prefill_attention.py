"""Prefill attention on the GPU against float64 over the values that the cache's codes stand for."""

from typing import Any

import numpy as np
import pytest

from kvrelay_kernels.block_mask import BlockMask
from kvrelay_kernels.cuda.batch import Uploads, upload_batch
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.module import KernelCache, device_arch
from kvrelay_kernels.cuda.prefill_attention_route import HOPPER, Route
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.quant.formats import SCHEMES
from tests.gpu.prompt_case import POISON, Case, arena_of, check, exact, make_case, new_attention, run

HEADS = {64: (9, 3, 64), 96: (12, 4, 96), 128: (32, 8, 128), 256: (16, 2, 256)}
FORMATS = ["none", "int8-g32", "int4-g32", *SCHEMES]
RAGGED = [(700, 700), (10, 64), (1, 1), (129, 129), (500, 1337), (299, 300), (1, 2000), (128, 256)]


@pytest.fixture(params=["sparse", "sparse_mma"])
def route(cupy: Any, request: pytest.FixtureRequest) -> Route:
    """The own kernels, as far as they run here."""
    if request.param == "sparse" and device_arch() != HOPPER:
        pytest.skip("this kernel needs compute capability 9.0")
    return request.param


@pytest.mark.parametrize("head_dim", HEADS)
@pytest.mark.parametrize("element", ["bfloat16", "float16"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_ragged_prompts(
    cupy: Any, kernels: KernelCache, route: Route, fmt: str, element: Element16, head_dim: int
) -> None:
    case = make_case(np.random.default_rng(), RAGGED, HEADS[head_dim], fmt, element)
    check(cupy, new_attention(kernels, element, route), case)


def test_the_portable_kernel_in_little_shared_memory(
    cupy: Any, kernels: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As classes like 8.9 and 12.0 run it."""
    monkeypatch.setattr("kvrelay_kernels.cuda.block_sparse_mma.shared_memory_limit", lambda: 99 << 10)
    case = make_case(np.random.default_rng(), RAGGED, HEADS[256], window=300)
    check(cupy, new_attention(kernels, "bfloat16", "sparse_mma"), case)


@pytest.mark.parametrize("window", [1, 63, 512, 1024])
@pytest.mark.parametrize(
    ("fmt", "head_dim"), [("none", 128), ("int8-g64", 128), ("int4-g32", 96), ("none", 256)]
)
def test_windows(cupy: Any, kernels: KernelCache, route: Route, fmt: str, head_dim: int, window: int) -> None:
    sequences = [*RAGGED, (900, 2500)]
    case = make_case(np.random.default_rng(), sequences, HEADS[head_dim], fmt, window=window)
    check(cupy, new_attention(kernels, "bfloat16", route), case)


@pytest.mark.parametrize("head_dim", HEADS)
def test_masks_of_every_kind(cupy: Any, kernels: KernelCache, route: Route, head_dim: int) -> None:
    rng = np.random.default_rng()
    sequences = [(700, 1500), (1111, 1111), (64, 900), (300, 2000), (513, 600)]
    starts = np.array([0, 50, 177, 640, 1025], np.int32)
    masks = {
        0: BlockMask.causal(700, 1500, 200, sinks=4),
        1: BlockMask.documents(1111, 1111, starts),
        2: BlockMask.documents(64, 900, starts, shared=130),
        3: BlockMask.causal(300, 2000, 1),
        4: BlockMask.causal(513, 600),
    }
    for s in (1, 3, 4):
        masks[s] = masks[s].restricted(rng.random(masks[s].kinds.shape) < 0.6)
    case = make_case(rng, sequences, HEADS[head_dim])
    check(cupy, new_attention(kernels, "bfloat16", route), case, masks)


@pytest.mark.parametrize(
    "heads", [(8, 8, 128), (16, 4, 64), (8, 1, 128), (5, 5, 64), (24, 2, 128), (4, 4, 256)]
)
def test_query_heads_per_kv_head(
    cupy: Any, kernels: KernelCache, route: Route, heads: tuple[int, int, int]
) -> None:
    case = make_case(np.random.default_rng(), RAGGED[:6], heads, "int8-g32")
    check(cupy, new_attention(kernels, "bfloat16", route), case)


def test_rows_without_keys_are_zero(cupy: Any, kernels: KernelCache, route: Route) -> None:
    case = make_case(np.random.default_rng(), [(300, 300)])
    wanted = np.ones((3, 3), np.bool_)
    wanted[1] = False
    bits = run(
        cupy,
        new_attention(kernels, "bfloat16", route),
        case,
        {0: BlockMask.causal(300, 300).restricted(wanted)},
    )
    assert not bits[128:256].any()
    assert bits[:128].any()


@pytest.mark.parametrize("fmt", ["none", "int8-g64"])
def test_rows_of_decoding_sequences_stay_as_they_are(
    cupy: Any, kernels: KernelCache, route: Route, fmt: str
) -> None:
    sequences = [(1, 90), (200, 333), (1, 1), (1, 70), (65, 65), (1, 500)]
    read = [False, True, True, False, True, False]
    case = make_case(np.random.default_rng(), sequences, fmt=fmt, read=read)
    check(cupy, new_attention(kernels, "bfloat16", route), case)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize(
    ("fmt", "head_dim"), [("none", 128), ("int8-g64", 128), ("int4-g64", 256), ("none", 64), ("turbo3", 128)]
)
def test_a_row_has_the_same_bits_in_any_chunk(
    cupy: Any, kernels: KernelCache, route: Route, fmt: str, head_dim: int, window: int | None
) -> None:
    whole = make_case(np.random.default_rng(), [(1500, 1500)], HEADS[head_dim], fmt, window=window)
    attention = new_attention(kernels, "bfloat16", route)
    want = run(cupy, attention, whole)
    for begin, end in [(0, 137), (137, 138), (138, 700), (700, 1473), (1473, 1500)]:
        chunk = part_of(whole, begin, end)
        assert np.array_equal(run(cupy, attention, chunk), want[begin:end]), f"{begin} to {end}"


def part_of(case: Case, begin: int, end: int) -> Case:
    """Rows `begin` to `end` of a case with one prompt, as a step after those before."""
    part = make_case(np.random.default_rng(0), [(end - begin, end)], (1, 1, 64)).batch
    batch = type(part)(
        part.token_ids,
        part.positions,
        part.row_starts,
        part.lengths,
        case.batch.block_tables,
        part.logit_rows,
        part.read,
    )
    return Case(batch, case.cache, case.layout, case.spec, case.element, case.q[begin:end])


@pytest.mark.parametrize("head_dim", HEADS)
def test_same_input_same_bits(cupy: Any, kernels: KernelCache, route: Route, head_dim: int) -> None:
    case = make_case(np.random.default_rng(), RAGGED, HEADS[head_dim], "int8-g32")
    attention, arena = new_attention(kernels, "bfloat16", route), arena_of(cupy, case)
    first = run(cupy, attention, case, arena=arena)
    assert all(np.array_equal(run(cupy, attention, case, arena=arena), first) for _ in range(20))


@pytest.mark.parametrize("fmt", ["none", "int4-g64"])
def test_long_prompts(cupy: Any, kernels: KernelCache, route: Route, fmt: str) -> None:
    """Weighted sums of 32768 standard normal values nearly cancel: a lost bit shows here first."""
    case = make_case(np.random.default_rng(), [(2048, 32768), (4096, 4096)], (4, 1, 128), fmt)
    check(cupy, new_attention(kernels, "bfloat16", route), case, rows=32)


def test_extreme_scores(cupy: Any, kernels: KernelCache, route: Route) -> None:
    """Scores of thousands, falling and rising: the running maximum has to move many times."""
    case = make_case(np.random.default_rng(), [(600, 2000)], element="float16")
    case.q[:] *= 60
    check(cupy, new_attention(kernels, "float16", route), case, bound=5e-3)


def test_nan_stays_in_its_sequence(cupy: Any, kernels: KernelCache, route: Route) -> None:
    case = make_case(np.random.default_rng(), [(200, 200), (150, 300)], element="float16")
    case.q[5] = np.nan
    got = run(cupy, new_attention(kernels, "float16", route), case).view(np.float16)
    assert np.isnan(got[5]).all()
    assert np.isfinite(np.delete(got, 5, 0)).all()
    which, want = exact(cupy, case)[1]
    assert np.linalg.norm(got[200 + which].astype(np.float64) - want) / np.linalg.norm(want) < 1e-3


def test_no_buffer_grows_with_the_prompts_served(cupy: Any, kernels: KernelCache, route: Route) -> None:
    rng = np.random.default_rng()
    whole = make_case(rng, [(2000, 2000)], fmt="int8-g64")
    attention, arena, uploads = new_attention(kernels, "bfloat16", route), arena_of(cupy, whole), Uploads()
    q, out = cupy.asarray(whole.q.view(np.uint16)), cupy.full(whole.q.shape, POISON, np.uint16)

    def serve(rows: int, length: int) -> None:
        batch = upload_batch(part_of(whole, length - rows, length).batch, uploads)
        attention.prefill(q[:rows], batch, arena, 1, whole.spec, out[:rows])

    serve(2000, 2000)
    serve(1, 1)
    pool = cupy.get_default_memory_pool()
    before = pool.total_bytes()
    for _ in range(1000):
        length = int(rng.integers(1, 2001))
        serve(int(rng.integers(1, length + 1)), length)
    cupy.cuda.get_current_stream().synchronize()
    assert pool.total_bytes() == before


def test_refuses_what_it_cannot_run(cupy: Any, kernels: KernelCache, route: Route) -> None:
    case = make_case(np.random.default_rng(), [(10, 20)])
    with pytest.raises(ValueError, match="does not fit"):
        run(cupy, new_attention(kernels, "bfloat16", route), case, {0: BlockMask.causal(10, 21)})
    with pytest.raises(FormatUnsupported, match="does not go with"):
        run(cupy, new_attention(kernels, "float16", route), case)
    with pytest.raises(FormatUnsupported, match="head dimensions"):
        run(
            cupy,
            new_attention(kernels, "bfloat16", route),
            make_case(np.random.default_rng(), [(10, 20)], (2, 1, 160)),
        )
