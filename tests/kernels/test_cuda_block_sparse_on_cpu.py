"""Both block-sparse kernels, run on this processor, against float64 attention under a dense mask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.block_mask import EMPTY, TILE, BlockMask
from kvrelay_kernels.cuda.block_sparse import BlockMaps, BlockSparse, SparseProblem
from kvrelay_kernels.cuda.block_sparse_mma import SHAPES, BlockSparseMma, choose_shape
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.prefill_attention_route import HOPPER
from kvrelay_kernels.cuda.prefill_attention_step import lay_out_step, prompt_masks
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.quant import BLOCK_TOKENS
from tests.gpu.prompt_case import BOUNDS, POISON, Case, make_case
from tests.kernels.host_kernels import COMPILER, HostKernels, blocks_map

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
AMPERE, ADA = 163 << 10, 99 << 10
"""Shared memory that a thread block may have on compute capabilities 8.0 and 8.9."""
PROCESSORS = 2
"""Thread blocks of Hopper's kernel; they run one behind the other, so the first does all the work."""


@dataclass(frozen=True)
class Variant:
    """What one kernel is compiled for."""

    heads: tuple[int, int, int]
    element: Element16
    arch: str = "sm_80"
    """`sm_90a` runs Hopper's kernel, anything else the portable one."""
    shared_limit: int = AMPERE


@dataclass(frozen=True)
class HostMaps:
    """In place of `BlockMaps`, for Hopper's kernel."""

    keys: NDArray[np.uint64]
    values: NDArray[np.uint64]


SMALL = Variant((2, 1, 64), "bfloat16")
KERNELS = {"portable": SMALL, "Hopper": replace(SMALL, arch=HOPPER)}
VARIANTS = {
    "64": SMALL,
    "96": Variant((2, 2, 96), "float16"),
    "128": Variant((3, 1, 128), "bfloat16"),
    "256": Variant((1, 1, 256), "float16"),
    "256 in little shared memory": Variant((2, 1, 256), "bfloat16", shared_limit=ADA),
    "64 on Hopper": Variant((3, 1, 64), "float16", HOPPER),
    "96 on Hopper": Variant((2, 2, 96), "bfloat16", HOPPER),
    "128 on Hopper": Variant((2, 1, 128), "bfloat16", HOPPER),
    "256 on Hopper": Variant((1, 1, 256), "float16", HOPPER),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels of this module, each compiled once."""
    return HostKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(params=KERNELS)
def small(request: pytest.FixtureRequest) -> Variant:
    """Either kernel, for a small model."""
    return KERNELS[request.param]


def case_of(variant: Variant, sequences: Sequence[tuple[int, int]], **options: Any) -> Case:
    rng = np.random.default_rng()
    return make_case(rng, sequences, variant.heads, element=variant.element, **options)


def run(
    kernels: Any, variant: Variant, case: Case, masks: Mapping[int, BlockMask] | None = None
) -> NDArray[np.uint16]:
    """Bits of all rows, from a poisoned buffer; the layer lies behind one that no query may read."""
    work = lay_out_step(case.batch, prompt_masks(case.batch, case.spec.window, masks)).work
    arena = np.stack([np.full_like(case.cache.arena, 0xFF), case.cache.arena])
    problem = SparseProblem(*variant.heads, variant.element)
    blocks = arena.shape[0] * arena.shape[1]
    maps: Any = BlockMaps(case.layout, arena.ctypes.data, blocks)
    if variant.arch == HOPPER:
        shape = variant.heads[1], BLOCK_TOKENS, variant.heads[2]
        addresses = maps.key_address, maps.value_address
        maps = HostMaps(*(blocks_map(at, blocks, case.layout.block_bytes, shape) for at in addresses))
        attention = BlockSparse(problem, kernels, HOPPER, PROCESSORS, np.zeros(1, np.uint32))
    else:
        attention = BlockSparseMma(problem, kernels, variant.arch, variant.shared_limit)
    out = np.full(case.q.shape, POISON, np.uint16)
    lists = work.items, work.entries, work.low
    attention(
        case.q.view(np.uint16), out, maps, arena.shape[1], case.batch.block_tables, lists, case.spec.scale
    )
    return out


def exact(case: Case, s: int, mask: BlockMask) -> NDArray[np.float64]:
    """Float64 attention of a prompt's rows; zeros for those that see nothing."""
    share = case.spec.heads // case.spec.kv_heads
    k, v = (x[s].astype(np.float64).repeat(share, 1) for x in (case.cache.keys, case.cache.values))
    rows = slice(*case.batch.row_starts[s : s + 2])
    scores = np.einsum("rhd,nhd->hrn", case.q[rows].astype(np.float64), k, optimize=True) * case.spec.scale
    seen = mask.dense()
    scores = np.where(seen, scores, -np.inf)
    p = np.where(seen, np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e300)), 0)
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    return np.einsum("hrn,nhd->rhd", p, v, optimize=True)


def check(kernels: Any, variant: Variant, case: Case, masks: Mapping[int, BlockMask] | None = None) -> None:
    """Every prompt is exact, every row that is no prompt's is as it was."""
    bits = run(kernels, variant, case, masks)
    starts, prompts = case.batch.row_starts, case.batch.prompts
    for s, mask in prompt_masks(case.batch, case.spec.window, masks).items():
        got = bits[starts[s] : starts[s + 1]].view(case.q.dtype).astype(np.float64)
        want = exact(case, s, mask)
        error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-9)
        assert error < BOUNDS[case.element], f"sequence {s}: {error}"
    for s in np.flatnonzero(~prompts):
        assert (bits[starts[s] : starts[s + 1]] == POISON).all(), f"sequence {s} is no prompt"


@pytest.mark.parametrize("name", VARIANTS)
def test_prompts_and_chunks(kernels: Any, name: str) -> None:
    variant = VARIANTS[name]
    sequences = [(130, 130), (3, 70), (1, 1), (1, 64), (40, 200)]
    check(kernels, variant, case_of(variant, sequences, read=[True, True, True, False, True]))


@pytest.mark.parametrize("window", [1, 63, 200])
def test_windows(kernels: Any, small: Variant, window: int) -> None:
    check(kernels, small, case_of(small, [(150, 150), (70, 390)], window=window))


def test_masks_of_every_kind(kernels: Any, small: Variant) -> None:
    sequences = [(140, 300), (260, 260), (20, 290), (200, 520), (130, 400)]
    masks = {
        0: BlockMask.causal(140, 300, 40, sinks=4),
        1: BlockMask.documents(260, 260, np.array([0, 50, 177], np.int32)),
        2: BlockMask.documents(20, 290, np.array([0, 280], np.int32), shared=130),
        3: BlockMask.causal(200, 520),
        4: BlockMask.causal(130, 400, 150),
    }
    for s in (3, 4):
        tiles = np.random.default_rng().random(masks[s].kinds.shape) < 0.6
        masks[s] = masks[s].restricted(tiles)
    check(kernels, small, case_of(small, sequences), masks)


def test_more_tiles_than_a_warp_looks_up_at_once(kernels: Any, small: Variant) -> None:
    check(kernels, small, case_of(small, [(5, 64 * 70 + 9)]))


def test_rows_without_keys_are_zero(kernels: Any, small: Variant) -> None:
    case = case_of(small, [(300, 300)])
    wanted = np.ones((3, 3), np.bool_)
    wanted[1] = False
    mask = BlockMask.causal(300, 300).restricted(wanted)
    assert (mask.kinds[1] == EMPTY).all()
    bits = run(kernels, small, case, {0: mask})
    assert not bits[TILE : 2 * TILE].any()
    assert bits[:TILE].any()


@pytest.mark.parametrize("window", [None, 100])
def test_a_row_has_the_same_bits_in_any_chunk(kernels: Any, small: Variant, window: int | None) -> None:
    whole = case_of(small, [(300, 300)], window=window)
    want = run(kernels, small, whole)
    for begin, end in [(0, 37), (37, 38), (38, 200), (200, 300)]:
        part = make_case(np.random.default_rng(0), [(end - begin, end)], small.heads).batch
        chunk = replace(
            whole, batch=replace(part, block_tables=whole.batch.block_tables), q=whole.q[begin:end]
        )
        assert np.array_equal(run(kernels, small, chunk), want[begin:end]), f"{begin} to {end}"


def test_extreme_scores(kernels: Any, small: Variant) -> None:
    """Scores of thousands, falling and rising: the running maximum has to move many times."""
    variant = replace(small, element="float16")
    case = case_of(variant, [(60, 300)])
    case.q[:] *= 60
    check(kernels, variant, case)


def test_nan_stays_in_its_row(kernels: Any, small: Variant) -> None:
    variant = replace(small, element="float16")
    case = case_of(variant, [(20, 20), (15, 80)])
    case.q[5] = np.nan
    got = run(kernels, variant, case).view(np.float16)
    assert np.isnan(got[5]).all()
    assert np.isfinite(np.delete(got, 5, 0)).all()


def test_shapes_fit_their_class() -> None:
    assert choose_shape(256, AMPERE) is SHAPES[256][0]
    assert choose_shape(256, ADA) is SHAPES[256][1]
    for head_dim in SHAPES:
        assert choose_shape(head_dim, ADA).shared_bytes(head_dim) <= ADA
    with pytest.raises(FormatUnsupported, match="head dimension 128 needs 81932 bytes"):
        choose_shape(128, 48 << 10)
