"""Attention over the arena on MLX's fused kernel: blocks that no row sees are not even gathered."""

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.interface import AttentionSpec, BlockCounts, StepBatch
from kvrelay_kernels.mlx.arena import MlxArena
from kvrelay_kernels.mlx.rotation import rotate
from kvrelay_kernels.quant import BLOCK_TOKENS


def attend(
    q: mx.array, batch: StepBatch, arena: MlxArena, layer: int, spec: AttentionSpec, counts: BlockCounts
) -> mx.array:
    """As `Backend.attention`; sequences with equally many rows go together, others one by one."""
    sizes = np.diff(batch.row_starts)
    alike = len(sizes) > 0 and (sizes == sizes[0]).all()
    groups = [np.arange(batch.sequences)] if alike else [np.array([s]) for s in np.flatnonzero(sizes)]
    parts = [_attend_alike(q, batch, arena, layer, spec, counts, members) for members in groups]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def _attend_alike(
    q: mx.array,
    batch: StepBatch,
    arena: MlxArena,
    layer: int,
    spec: AttentionSpec,
    counts: BlockCounts,
    members: NDArray[np.intp],
) -> mx.array:
    """Attention of sequences that have the same number of rows, side by side in one call."""
    first, last = int(batch.row_starts[members[0]]), int(batch.row_starts[members[-1] + 1])
    positions = batch.positions[first:last].reshape(len(members), -1)
    ends = positions[:, -1] // BLOCK_TOKENS + 1
    starts = np.zeros_like(ends)
    if spec.window is not None:
        starts = np.maximum(positions[:, 0] - spec.window + 1, 0) // BLOCK_TOKENS
    counts.computed += int((ends - starts).sum())
    counts.skipped += int((-(-batch.lengths[members] // BLOCK_TOKENS) - (ends - starts)).sum())
    # Shorter sequences are padded with their last block; the mask hides its second appearance.
    order = starts[:, None] + np.arange((ends - starts).max())
    tables = np.take_along_axis(batch.block_tables[members], np.minimum(order, ends[:, None] - 1), axis=1)
    keys = (order[:, :, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)).reshape(len(members), 1, -1)
    rows = positions[:, :, None]
    seen = keys <= rows
    if spec.window is not None:
        seen &= keys > rows - spec.window
    # What lies behind a sequence's end may be anything, NaN too, which no probability of 0 would cancel.
    written = mx.array(keys < batch.lengths[members][:, None, None])[..., None]
    k, v = (
        mx.where(written, arena.gather(layer, side, mx.array(tables)), 0).astype(q.dtype) for side in "kv"
    )
    shape = (len(members), positions.shape[1], spec.heads, spec.head_dim)
    heads = q[first:last].reshape(shape).swapaxes(1, 2)
    out = mx.fast.scaled_dot_product_attention(heads, k, v, scale=spec.scale, mask=mx.array(seen[:, None]))
    if arena.layout.format.rotates_values:
        out = rotate(out)
    return out.swapaxes(1, 2).reshape(last - first, spec.heads * spec.head_dim)
