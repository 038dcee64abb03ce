"""Random paged caches, bytes that no query may read set to 0xff (NaN as a half), and exact attention."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.interface import AttentionSpec
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout
from kvrelay_kernels.quant.codec import dequantize, quantize

Change = Callable[[NDArray[np.float32], str], NDArray[np.float32]]
"""Makes of standard normal numbers `[length, kv_heads, head_dim]` what side `k` or `v` is to hold."""

DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class PagedCache:
    """One layer of an arena, its block tables, and the values that the codes stand for."""

    arena: NDArray[np.uint8]
    tables: NDArray[np.int32]
    lengths: NDArray[np.int32]
    keys: list[NDArray[np.float32]]
    """For each sequence `[length, kv_heads, head_dim]`."""
    values: list[NDArray[np.float32]]


def random_cache(
    rng: np.random.Generator, layout: BlockLayout, lengths: list[int], change: Change | None = None
) -> PagedCache:
    """Standard normal keys and values, or what `change` makes of them; blocks scattered over the arena."""
    needed = [-(-length // BLOCK_TOKENS) for length in lengths]
    order = rng.permutation(sum(needed) + 3).astype(np.int32)
    arena = np.full((len(order), layout.block_bytes), 0xFF, np.uint8)
    tables = np.full((len(lengths), max(needed) + 1), len(order) + 1000, np.int32)
    keys, values, used = [], [], 0
    for s, length in enumerate(lengths):
        blocks = order[used : used + needed[s]]
        tables[s, : needed[s]] = blocks
        used += needed[s]
        for side, kept in (("k", keys), ("v", values)):
            drawn = rng.standard_normal((length, layout.kv_heads, layout.head_dim), np.float32)
            drawn = drawn if change is None else change(drawn, side)
            kept.append(_fill(drawn, layout, arena, blocks, side))
    return PagedCache(arena, tables, np.array(lengths, np.int32), keys, values)


def _fill(
    drawn: NDArray[np.float32],
    layout: BlockLayout,
    arena: NDArray[np.uint8],
    blocks: NDArray[np.int32],
    side: str,
) -> NDArray[np.float32]:
    if not len(drawn):
        return drawn
    if layout.format.quantized:
        parts = quantize(drawn, layout.format)
        exact = dequantize(parts, layout.format)
    else:
        rounded = drawn.astype(DTYPES[layout.format.element])
        parts, exact = {"values": rounded}, rounded.astype(np.float32)
    for name, array in parts.items():
        frame = layout.frame(f"{side}_{name}")
        octets = np.ascontiguousarray(array).view(np.uint8)
        for i, block in enumerate(blocks):
            rows = octets[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS].transpose(1, 0, 2)
            view = arena[block, frame.offset : frame.offset + frame.nbytes].reshape(
                layout.kv_heads, BLOCK_TOKENS, -1
            )
            view[:, : rows.shape[1]] = rows
    return exact


def exact_attention(
    q: NDArray[Any], cache: PagedCache, spec: AttentionSpec, rows: int
) -> NDArray[np.float64]:
    """Float64 attention of `q` `[sequences * rows, heads, head_dim]`; zeros where a sequence is empty."""
    out = np.zeros(q.shape, np.float64)
    share = spec.heads // spec.kv_heads
    for s, length in enumerate(cache.lengths.tolist()):
        if length == 0:
            continue
        k, v = cache.keys[s].astype(np.float64), cache.values[s].astype(np.float64)
        at = slice(s * rows, (s + 1) * rows)
        queries = q[at].astype(np.float64).reshape(rows, spec.kv_heads, share, spec.head_dim)
        scores = np.einsum("rgjd,ngd->rgjn", queries, k, optimize=True) * spec.scale
        position, key = np.arange(length - rows, length)[:, None], np.arange(length)
        hidden = key > position
        if spec.window is not None:
            hidden |= key <= position - spec.window
        scores = np.where(hidden[:, None, None, :], -np.inf, scores)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out[at] = np.einsum("rgjn,ngd->rgjd", p, v, optimize=True).reshape(rows, spec.heads, spec.head_dim)
    return out
