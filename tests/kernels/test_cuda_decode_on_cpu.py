"""Split-K decode attention, planned and run on this processor, against float64 attention."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cuda.decode_attention import DecodeLaunch, DecodeProblem, Element16, LaunchShape
from kvrelay_kernels.interface import AttentionSpec
from kvrelay_kernels.quant import BlockLayout, parse_format
from tests.gpu.paged_cache import DTYPES, Change, PagedCache, exact_attention, random_cache
from tests.kernels.host_kernels import COMPILER, HostKernels, box_map

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
BLOCKS = 3
"""Thread blocks: few, so that heads lie in one, in two and in three of them."""
BOUND = 2e-3


@dataclass(frozen=True)
class Variant:
    """What one kernel is compiled for."""

    fmt: str
    head_dim: int
    heads: tuple[int, int]
    element: Element16
    rows: int = 1
    window: int | None = None
    tile: int = 32
    arch: str = "sm_90a"
    side: int = 1

    @property
    def problem(self) -> DecodeProblem:
        """The problem it stands for."""
        total, kv = self.heads
        layout = BlockLayout(parse_format(self.fmt, self.head_dim, self.element), kv, self.head_dim)
        spec = AttentionSpec(total, kv, self.head_dim, self.head_dim**-0.5, self.window)
        return DecodeProblem(layout, spec, self.element, self.rows)


VARIANTS = {
    "none bfloat16": Variant("none", 64, (4, 2), "bfloat16"),
    "none float16, copied without the engine": Variant("none", 128, (2, 1), "float16", arch="sm_80"),
    "int8": Variant("int8-g64", 128, (4, 2), "bfloat16"),
    "int8 of two heads side by side": Variant("int8-g64", 128, (4, 2), "bfloat16", tile=16, side=2),
    "int8 in rows with a window": Variant("int8-g32", 96, (6, 2), "float16", rows=3, window=70),
    "int8 of 256, copied without the engine": Variant(
        "int8-g64", 256, (2, 1), "bfloat16", tile=16, arch="sm_80"
    ),
    "int4": Variant("int4-g64", 64, (3, 1), "float16", tile=64),
    "int4 in rows": Variant("int4-g32", 128, (4, 1), "bfloat16", rows=4),
    "int6": Variant("int6-g64", 128, (4, 2), "bfloat16"),
    "int6 in rows, copied without the engine": Variant(
        "int6-g32", 96, (6, 2), "float16", rows=3, window=70, arch="sm_80"
    ),
    "mxfp8": Variant("mxfp8", 128, (4, 2), "bfloat16"),
    "mxfp8 of 96 in rows, frames between boxes": Variant("mxfp8", 96, (3, 1), "float16", rows=4),
    "mxfp4": Variant("mxfp4", 64, (4, 2), "bfloat16", tile=64),
    "mxfp4 of 256, copied without the engine": Variant("mxfp4", 256, (2, 1), "bfloat16", arch="sm_80"),
    "mxfp4 of two heads side by side, in rows with a window": Variant(
        "mxfp4", 64, (16, 2), "float16", rows=3, window=100, side=2
    ),
    "nvfp4": Variant("nvfp4", 96, (4, 2), "bfloat16"),
    "nvfp4 in rows with a window": Variant("nvfp4", 128, (4, 1), "float16", rows=4, window=100, tile=64),
    "turbo4": Variant("turbo4", 128, (4, 2), "bfloat16", tile=64),
    "turbo4 of three runs": Variant("turbo4", 96, (6, 2), "float16", rows=3),
    "turbo3": Variant("turbo3", 64, (4, 2), "bfloat16"),
    "turbo3 of 256": Variant("turbo3", 256, (2, 1), "float16", tile=16),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels of this module, each compiled once."""
    return HostKernels(tmp_path_factory.mktemp("kernels"))


def run(
    kernels: Any, variant: Variant, cache: PagedCache, q: NDArray[Any], launches: int = 1
) -> NDArray[np.float32]:
    """The kernel's output, from a poisoned buffer; the layer lies behind one that no query may read."""
    problem, side = variant.problem, variant.side
    shape = LaunchShape(warps=2 * side, tile=variant.tile, side=side)
    launch = DecodeLaunch(problem, shape, len(cache.lengths), BLOCKS, variant.arch, kernels, np)
    arena = np.stack([np.full_like(cache.arena, 0xFF), cache.arena])
    launch.plan(cache.lengths)
    boxes = box_map(arena.reshape(-1), problem.box_rows(shape))
    outs = [np.full(q.shape, 0xFFFF, np.uint16) for _ in range(launches)]
    for out in outs:
        launch(q.view(np.uint16), arena.ctypes.data, boxes, cache.arena.nbytes, cache.tables, out)
        assert (out == outs[0]).all()
    return outs[0].view(q.dtype).astype(np.float32)


def relative_error(got: NDArray[Any], want: NDArray[Any]) -> float:
    size = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    return size if np.isfinite(size) else float("inf")


def attend(
    kernels: Any, name: str, lengths: list[int], change: Change | None = None, launches: int = 1
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """What the kernel answers to random queries, and what is right."""
    variant, rng = VARIANTS[name], np.random.default_rng(len(name))
    problem = variant.problem
    cache = random_cache(rng, problem.layout, lengths, change)
    shape = (len(lengths) * variant.rows, problem.spec.heads, problem.spec.head_dim)
    q = rng.standard_normal(shape).astype(DTYPES[variant.element])
    return run(kernels, variant, cache, q, launches), exact_attention(q, cache, problem.spec, variant.rows)


@pytest.mark.parametrize("name", VARIANTS)
def test_ragged_batch(kernels: Any, name: str) -> None:
    """Whole heads, heads cut in two and three, one token, and no token at all."""
    each = VARIANTS[name].rows
    lengths = [each, 0, 64, 130, 401]
    got, want = attend(kernels, name, lengths)
    for s, length in enumerate(lengths):
        rows = slice(s * each, (s + 1) * each)
        if length == 0:
            assert not got[rows].any()
        else:
            assert relative_error(got[rows], want[rows]) < 2 * BOUND, f"sequence {s}"
    assert relative_error(got, want) < BOUND


def test_launches_leave_nothing_for_the_next_one(kernels: Any) -> None:
    """Thread blocks hand sums to each other through memory that is the same for every launch."""
    got, want = attend(kernels, "int4", [1500, 130], launches=3)
    assert relative_error(got, want) < BOUND


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_more_blocks_than_are_looked_up_at_once(kernels: Any, name: str) -> None:
    got, want = attend(kernels, name, [64 * 220 + 7, 130])
    assert relative_error(got, want) < BOUND


SPREADS: dict[str, Callable[[int, int], NDArray[Any]]] = {
    "by group": lambda length, dim: 2.0 ** np.repeat(np.arange(dim // 32) * 25 - 50, 32)[None],
    "rising": lambda length, dim: 2.0 ** (np.arange(length) / 4 - 30)[:, None],
    "rising slowly": lambda length, dim: 2.0 ** (np.arange(length) / 16)[:, None],
    "falling": lambda length, dim: 2.0 ** (30 - np.arange(length) / 4)[:, None],
    "with zeros": lambda length, dim: np.where(np.arange(length) % 3, 2.0**-20, 0)[:, None],
}
"""What values are multiplied with, by token and dimension."""


@pytest.mark.parametrize("spread", SPREADS)
def test_powers_of_two_far_from_one(kernels: Any, spread: str) -> None:
    """Scales of values beyond the range of float16, whose exponents differ by group and by token."""

    def change(x: NDArray[np.float32], side: str) -> NDArray[np.float32]:
        sizes = SPREADS[spread](len(x), x.shape[2]).astype(np.float32)
        return x * sizes[:, None] if side == "v" else x

    got, want = attend(kernels, "mxfp8", [250], change)
    for first in range(0, got.shape[-1], 32):
        dims = slice(first, first + 32)
        assert relative_error(got[..., dims], want[..., dims]) < 2 * BOUND, f"dimensions from {first} on"


def test_small_scales_of_short_groups(kernels: Any) -> None:
    """All that an e4m3 scale can be, down to its subnormal numbers."""

    def change(x: NDArray[np.float32], side: str) -> NDArray[np.float32]:
        spread = 2.0 ** np.repeat(np.arange(x.shape[2] // 16) * 3 - 9, 16)
        return x * spread.astype(np.float32) if side == "v" else x

    got, want = attend(kernels, "nvfp4", [250], change)
    for first in range(0, got.shape[-1], 16):
        dims = slice(first, first + 16)
        assert relative_error(got[..., dims], want[..., dims]) < 2 * BOUND, f"dimensions from {first} on"


@pytest.mark.parametrize("side", "kv")
@pytest.mark.parametrize("name", ["int8", "mxfp4", "nvfp4", "turbo3"])
def test_what_is_not_a_number_shows(kernels: Any, name: str, side: str) -> None:
    """In the sequence that holds it, and in no other."""

    def change(x: NDArray[np.float32], here: str) -> NDArray[np.float32]:
        if here == side and len(x) == 130:
            x[77, 0, 5] = np.nan
        return x

    got, _ = attend(kernels, name, [64, 130, 90], change)
    assert np.isfinite(got[[0, 2]]).all()
    assert not np.isfinite(got[1, 0, :16]).any()
