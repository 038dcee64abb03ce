"""Steps with prompts on random caches, through the GPU's prefill attention and through float64."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.block_mask import BlockMask
from kvrelay_kernels.cuda.arena import CudaArena
from kvrelay_kernels.cuda.batch import Uploads, upload_batch
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.device import find_gpu
from kvrelay_kernels.cuda.module import KernelCache
from kvrelay_kernels.cuda.prefill_attention import PrefillAttention
from kvrelay_kernels.cuda.prefill_attention_route import Route
from kvrelay_kernels.cuda.prefill_attention_step import Masks, prompt_masks
from kvrelay_kernels.interface import AttentionSpec, StepBatch
from kvrelay_kernels.plans import PlanStore
from kvrelay_kernels.quant import BlockLayout, parse_format
from tests.gpu.paged_cache import DTYPES, PagedCache, random_cache

POISON = 0xFFFF
BOUNDS = {"bfloat16": 5e-3, "float16": 1e-3}


@dataclass(frozen=True)
class Case:
    """Sequences of one step: `(new tokens, length, prompt or not)` each, and their cache."""

    batch: StepBatch
    cache: PagedCache
    layout: BlockLayout
    spec: AttentionSpec
    element: Element16
    q: NDArray[Any]


def make_case(
    rng: np.random.Generator,
    sequences: Sequence[tuple[int, int]],
    heads: tuple[int, int, int] = (8, 2, 128),
    fmt: str = "none",
    element: Element16 = "bfloat16",
    window: int | None = None,
    read: Sequence[bool] | None = None,
) -> Case:
    """A step of `(new tokens, length)` sequences; `read` says which are prompts, by default all."""
    total, kv, head_dim = heads
    layout = BlockLayout(parse_format(fmt, head_dim, element), kv, head_dim)
    cache = random_cache(rng, layout, [length for _, length in sequences])
    counts = np.array([count for count, _ in sequences], np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    positions = np.concatenate([np.arange(n - c, n) for c, n in sequences]).astype(np.int32)
    prompts = np.ones(len(counts), np.bool_) if read is None else np.array(read)
    batch = StepBatch(
        np.zeros(int(starts[-1]), np.int32),
        positions,
        starts,
        cache.lengths,
        cache.tables,
        starts[1:] - np.int32(1),
        prompts,
    )
    spec = AttentionSpec(total, kv, head_dim, head_dim**-0.5, window)
    q = rng.standard_normal((int(starts[-1]), total, head_dim)).astype(DTYPES[element])
    return Case(batch, cache, layout, spec, element, q)


def new_attention(
    kernels: KernelCache, element: Element16, route: Route | None = None, plans: PlanStore | None = None
) -> PrefillAttention:
    """As a backend makes it."""
    device = find_gpu().device_class
    return PrefillAttention(element, kernels, Uploads(), plans or PlanStore(), device, route=route)


def arena_of(cupy: Any, case: Case) -> CudaArena:
    """The cache as layer 1 of an arena; layer 0 is NaN."""
    arena = CudaArena(case.layout, 2, len(case.cache.arena))
    arena.bytes[0] = 0xFF
    arena.bytes[1] = cupy.asarray(case.cache.arena)
    return arena


def run(
    cupy: Any, attention: PrefillAttention, case: Case, masks: Masks | None = None, arena: Any = None
) -> NDArray[np.uint16]:
    """Bits of all rows, from a poisoned buffer."""
    out = cupy.full(case.q.shape, POISON, np.uint16)
    uploads = Uploads()  # its memory is read until the copies have run
    batch = upload_batch(case.batch, uploads)
    where = arena or arena_of(cupy, case)
    attention.prefill(cupy.asarray(case.q.view(np.uint16)), batch, where, 1, case.spec, out, masks)
    return out.get()


def exact(
    cupy: Any, case: Case, masks: Masks | None = None, rows: int | None = None
) -> dict[int, tuple[NDArray[np.intp], NDArray[np.float64]]]:
    """Float64 attention of each prompt, or of `rows` of its rows: their numbers, and their output."""
    spec, share = case.spec, case.spec.heads // case.spec.kv_heads
    found: dict[int, tuple[NDArray[np.intp], NDArray[np.float64]]] = {}
    for s, mask in prompt_masks(case.batch, spec.window, masks).items():
        which = np.unique(
            np.linspace(0, mask.queries - 1, min(rows or mask.queries, mask.queries)).astype(int)
        )
        k, v = (
            cupy.asarray(x[s].transpose(1, 0, 2)).astype(np.float64)
            for x in (case.cache.keys, case.cache.values)
        )
        q = cupy.asarray(case.q[case.batch.row_starts[s] + which].astype(np.float32)).astype(np.float64)
        seen = cupy.asarray(_seen(mask, which))
        out = cupy.empty(q.shape, np.float64)
        for head in range(spec.heads):
            scores = q[:, head] @ k[head // share].T * spec.scale
            peak = cupy.where(seen, scores, -1e300).max(-1, keepdims=True)
            p = cupy.where(seen, cupy.exp(cupy.where(seen, scores - peak, 0)), 0)
            out[:, head] = p @ v[head // share] / cupy.maximum(p.sum(-1, keepdims=True), 1e-300)
        found[s] = which, out.get()
    return found


def _seen(mask: BlockMask, rows: NDArray[Any]) -> NDArray[np.bool_]:
    """Rows of `mask.dense()`, which may be too large as a whole."""
    positions, key = (mask.keys - mask.queries + rows)[:, None], np.arange(mask.keys)
    seen = (key <= positions) & ((key >= mask.low[rows][:, None]) | (key < mask.prefix))
    wanted = np.repeat((mask.kinds != 0)[rows // 128], 128, 1)[:, : mask.keys]
    return seen & wanted


def check(
    cupy: Any,
    attention: PrefillAttention,
    case: Case,
    masks: Masks | None = None,
    rows: int | None = None,
    bound: float | None = None,
) -> None:
    """Every prompt is exact, every row that is no prompt's is as it was."""
    bits = run(cupy, attention, case, masks)
    got = bits.view(DTYPES[case.element]).astype(np.float64)
    limit = bound or BOUNDS[case.element]
    starts, prompts = case.batch.row_starts, case.batch.prompts
    for s, (which, want) in exact(cupy, case, masks, rows).items():
        mine = got[starts[s] + which]
        assert np.isfinite(got[starts[s] : starts[s + 1]]).all(), f"sequence {s}"
        norm = max(float(np.linalg.norm(want)), 1e-9)
        assert float(np.linalg.norm(mine - want)) / norm < limit, f"sequence {s}"
    for s in np.flatnonzero(~prompts):
        assert (bits[starts[s] : starts[s + 1]] == POISON).all(), f"sequence {s} is no prompt"
