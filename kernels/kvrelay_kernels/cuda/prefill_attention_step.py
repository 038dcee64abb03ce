"""A step's prompts as the prefill kernels take them: masks, lists of tiles, and the blocks that they read."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.block_mask import TILE, BlockMask
from kvrelay_kernels.cuda.block_sparse_work import Prompt, Work, lay_out
from kvrelay_kernels.interface import StepBatch
from kvrelay_kernels.quant import BLOCK_TOKENS

Masks = Mapping[int, BlockMask]
"""What prompts see, by their number in the step, where that is not what causal attention sees."""


@dataclass(frozen=True)
class StepLayout:
    """The prompts of one step under one kind of layer's mask, on the host."""

    work: Work
    sources: NDArray[np.int32]
    """`[n, 2]`: every arena block that the work reads, once, and how many of its tokens there are."""
    tables: NDArray[np.int32]
    """`[sequences, blocks]`: where each sequence's blocks are among the sources."""


def prompt_masks(batch: StepBatch, window: int | None, masks: Masks | None = None) -> dict[int, BlockMask]:
    """The mask of each prompt. Raises ValueError where one that is given does not fit its prompt."""
    found: dict[int, BlockMask] = {}
    counts = np.diff(batch.row_starts)
    for s in batch.prompt_numbers:
        shape = int(counts[s]), int(batch.lengths[s])
        mask = masks.get(s) if masks else None
        if mask is not None and (mask.queries, mask.keys) != shape:
            raise ValueError(f"a mask of {mask.queries} x {mask.keys} does not fit sequence {s}, {shape}")
        found[s] = mask or BlockMask.causal(*shape, window)
    return found


def lay_out_step(batch: StepBatch, masks: Masks) -> StepLayout:
    """Lists and blocks of the prompts, whose masks `masks` holds."""
    width = batch.block_tables.shape[1]
    prompts = [Prompt(mask, int(batch.row_starts[s]), s * width) for s, mask in masks.items()]
    places = [_places(mask) for mask in masks.values()]
    blocks = np.concatenate([batch.block_tables[s, place] for s, place in zip(masks, places, strict=True)])
    filled = np.concatenate(
        [
            np.minimum(mask.keys - place * BLOCK_TOKENS, BLOCK_TOKENS)
            for mask, place in zip(masks.values(), places, strict=True)
        ]
    )
    once, found = np.unique(blocks, return_inverse=True)
    tokens = np.zeros(len(once), np.int32)
    np.maximum.at(tokens, found, filled.astype(np.int32))
    tables = np.zeros_like(batch.block_tables)
    used = 0
    for s, place in zip(masks, places, strict=True):
        tables[s, place] = found[used : used + len(place)]
        used += len(place)
    sources = np.stack([once.astype(np.int32), tokens], 1)
    return StepLayout(lay_out(prompts, batch.rows), sources, tables)


def _places(mask: BlockMask) -> NDArray[np.intp]:
    """Which of its sequence's blocks a mask lets anybody see."""
    seen = np.repeat((mask.kinds != 0).any(0), TILE // BLOCK_TOKENS)
    return np.flatnonzero(seen[: -(-mask.keys // BLOCK_TOKENS)])
