"""What the block-sparse kernel is to do: query tiles with their lists of key tiles, laid out on the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.block_mask import TILE, BlockMask

ITEM_WORDS = 8
"""row, rows, position, table, first, tiles, prefix, length: see `Item` in `sources/sparse_shape.cuh`."""


@dataclass(frozen=True)
class Prompt:
    """One sequence of a step."""

    mask: BlockMask
    row: int
    """Where its queries begin among the step's rows."""
    table: int
    """Where its blocks begin in the flattened tables."""


@dataclass(frozen=True)
class Work:
    """Arrays of int32 that the kernel reads."""

    items: NDArray[np.int32]
    """`[n, ITEM_WORDS]`, the longest first, so that none is left over at the end."""
    entries: NDArray[np.int32]
    """All lists behind each other, as `BlockMask.lists` gives them."""
    low: NDArray[np.int32]
    """`[rows]`: the first key that a row sees behind the prefix."""
    computed: int
    """Tiles on the lists."""
    skipped: int


def lay_out(prompts: Sequence[Prompt], rows: int) -> Work:
    """The work of a step of `rows` rows, those outside of the prompts included."""
    low = np.zeros(rows, np.int32)
    parts: list[NDArray[np.int32]] = []
    lists: list[NDArray[np.int32]] = []
    used = 0
    for prompt in prompts:
        mask = prompt.mask
        starts, entries = mask.lists()
        first = np.arange(0, mask.queries, TILE, dtype=np.int32)
        items = np.empty((len(first), ITEM_WORDS), np.int32)
        items[:, 0] = prompt.row + first
        items[:, 1] = np.minimum(mask.queries - first, TILE)
        items[:, 2] = mask.keys - mask.queries + first
        items[:, 3] = prompt.table
        items[:, 4] = used + starts[:-1]
        items[:, 5] = np.diff(starts)
        items[:, 6] = mask.prefix
        items[:, 7] = mask.keys
        low[prompt.row : prompt.row + mask.queries] = mask.low
        parts.append(items)
        lists.append(entries)
        used += len(entries)
    every = np.concatenate(parts)
    every = every[np.argsort(-every[:, 5], kind="stable")]
    skipped = sum(prompt.mask.skipped for prompt in prompts)
    return Work(every, np.concatenate(lists), low, used, skipped)
