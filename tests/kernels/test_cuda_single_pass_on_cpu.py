"""Single-pass decode attention, alone and in clusters, run on this processor, against float64 attention."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cuda.decode_attention import LaunchShape
from kvrelay_kernels.cuda.decode_single_pass import SinglePassLaunch
from kvrelay_kernels.errors import FormatUnsupported
from tests.gpu.paged_cache import DTYPES, PagedCache, exact_attention, random_cache
from tests.kernels.host_kernels import COMPILER, HostKernels, box_map
from tests.kernels.test_cuda_decode_on_cpu import BOUND, Variant, relative_error

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")

VARIANTS = {
    "none bfloat16": (Variant("none", 64, (4, 2), "bfloat16"), 1),
    "none float16 in clusters": (Variant("none", 128, (2, 1), "float16"), 3),
    "copied without the engine": (Variant("int8-g64", 64, (2, 1), "float16", arch="sm_80"), 1),
    "int8 in clusters": (Variant("int8-g64", 128, (4, 2), "bfloat16"), 4),
    "int8 of 256": (Variant("int8-g64", 256, (2, 1), "bfloat16", tile=16), 2),
    "int6 in clusters": (Variant("int6-g32", 64, (2, 1), "bfloat16"), 2),
    "mxfp8 in clusters": (Variant("mxfp8", 128, (2, 1), "float16"), 2),
    "nvfp4": (Variant("nvfp4", 64, (2, 1), "bfloat16", tile=64), 1),
    "turbo3 in clusters": (Variant("turbo3", 64, (2, 1), "float16"), 3),
    "int4 in rows with a window, in clusters": (
        Variant("int4-g32", 96, (6, 2), "float16", rows=3, window=70, tile=64),
        2,
    ),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels of this module, each compiled once."""
    return HostKernels(tmp_path_factory.mktemp("kernels"))


def run(
    kernels: Any, variant: Variant, cluster: int, cache: PagedCache, q: NDArray[Any]
) -> NDArray[np.float32]:
    """The kernel's output, from a poisoned buffer; the layer lies behind one that no query may read."""
    shape = LaunchShape(warps=2, tile=variant.tile)
    launch = SinglePassLaunch(variant.problem, shape, cluster, variant.arch, kernels)
    arena = np.stack([np.full_like(cache.arena, 0xFF), cache.arena])
    out = np.full(q.shape, 0xFFFF, np.uint16)
    launch.plan(cache.lengths)
    boxes = box_map(arena.reshape(-1), variant.problem.box_rows(shape))
    launch(q.view(np.uint16), arena.ctypes.data, boxes, cache.arena.nbytes, cache.tables, out)
    return out.view(q.dtype).astype(np.float32)


def random_case(variant: Variant, lengths: list[int]) -> tuple[PagedCache, NDArray[Any]]:
    rng = np.random.default_rng(len(lengths) + variant.head_dim)
    shape = (len(lengths) * variant.rows, variant.problem.spec.heads, variant.head_dim)
    q = rng.standard_normal(shape).astype(DTYPES[variant.element])
    return random_cache(rng, variant.problem.layout, lengths), q


@pytest.mark.parametrize("name", VARIANTS)
def test_ragged_batch(kernels: Any, name: str) -> None:
    """One token, none at all, fewer blocks than a cluster has members, and more."""
    variant, cluster = VARIANTS[name]
    lengths = [variant.rows, 0, 64, 130, 401]
    cache, q = random_case(variant, lengths)
    got = run(kernels, variant, cluster, cache, q)
    want = exact_attention(q, cache, variant.problem.spec, variant.rows)
    for s, length in enumerate(lengths):
        rows = slice(s * variant.rows, (s + 1) * variant.rows)
        if length == 0:
            assert not got[rows].any()
        else:
            assert relative_error(got[rows], want[rows]) < 2 * BOUND, f"sequence {s}"
    assert relative_error(got, want) < BOUND


@pytest.mark.parametrize("name", ["copied without the engine", "nvfp4"])
def test_more_blocks_than_are_looked_up_at_once(kernels: Any, name: str) -> None:
    variant, cluster = VARIANTS[name]
    cache, q = random_case(variant, [64 * 110 + 7, 130])
    got = run(kernels, variant, cluster, cache, q)
    assert relative_error(got, exact_attention(q, cache, variant.problem.spec, 1)) < BOUND


def test_a_row_does_not_depend_on_its_company(kernels: Any) -> None:
    variant, cluster = VARIANTS["int8 in clusters"]
    cache, q = random_case(variant, [300, 77])
    alone = PagedCache(cache.arena, cache.tables[:1], cache.lengths[:1], cache.keys[:1], cache.values[:1])
    both = run(kernels, variant, cluster, cache, q)
    assert np.array_equal(run(kernels, variant, cluster, alone, q[:1]), both[:1])


def test_activations_that_are_no_numbers_show(kernels: Any) -> None:
    """A query with NaN spoils its own head alone."""
    variant, cluster = VARIANTS["int8 in clusters"]
    cache, q = random_case(variant, [100])
    q[0, 1, 5] = np.nan
    got = run(kernels, variant, cluster, cache, q)
    assert np.isnan(got[0, 1]).all()
    assert np.isfinite(got[0, [0, 2, 3]]).all()


def test_refuses_clusters_where_there_are_none() -> None:
    problem, shape = VARIANTS["int8 in clusters"][0].problem, LaunchShape(warps=2)
    kernels: Any = None
    with pytest.raises(FormatUnsupported, match="sm_80 runs clusters of 1 to 1"):
        SinglePassLaunch(problem, shape, 2, "sm_80", kernels)
    with pytest.raises(FormatUnsupported, match="not 17"):
        SinglePassLaunch(problem, shape, 17, "sm_90a", kernels)
