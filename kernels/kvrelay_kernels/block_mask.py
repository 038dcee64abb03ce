"""Which scores a prompt needs, by tiles of 128 x 128: what no row sees is neither loaded nor computed."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

TILE = 128
"""Queries, and keys, of a tile."""

EMPTY, PARTIAL, FULL = 0, 1, 2
"""What a tile can be: no row sees any of its keys, some do, every row sees all."""


@dataclass(frozen=True)
class BlockMask:
    """What the last `queries` positions of a sequence see of its `keys` keys.

    A row at position p sees the keys `low <= key <= p`, and those of the first `prefix` that are not behind
    it, as far as they lie in a tile that is not EMPTY. Query tiles begin at the first query, key tiles at
    key 0.
    """

    queries: int
    keys: int
    prefix: int
    low: NDArray[np.int32]
    """`[queries]`, never falling."""
    kinds: NDArray[np.uint8]
    """`[query tiles, key tiles]` of EMPTY, PARTIAL and FULL."""

    @classmethod
    def causal(cls, queries: int, keys: int, window: int | None = None, sinks: int = 0) -> Self:
        """Each row sees the last `window` keys up to its own (None: all) and the first `sinks`."""
        low = np.zeros(queries, np.int32)
        if window is not None:
            low = np.maximum(np.arange(keys - queries, keys, dtype=np.int32) - np.int32(window - 1), 0)
        return cls._of(queries, keys, sinks, low)

    @classmethod
    def documents(cls, queries: int, keys: int, starts: NDArray[np.int32], shared: int = 0) -> Self:
        """Each row sees the keys of its own document up to its own, and the first `shared`.

        `starts` are the positions at which documents begin, in order, the first of them 0.
        """
        positions = np.arange(keys - queries, keys)
        low = np.asarray(starts, np.int32)[np.searchsorted(starts, positions, side="right") - 1]
        return cls._of(queries, keys, shared, low)

    @classmethod
    def _of(cls, queries: int, keys: int, prefix: int, low: NDArray[np.int32]) -> Self:
        if not 0 < queries <= keys:
            raise ValueError(f"{queries} queries cannot be the last of {keys} keys")
        low = np.where(low <= prefix, 0, low).astype(np.int32)  # the two ranges are one
        return cls(queries, keys, prefix, low, _kinds(queries, keys, prefix, low))

    def restricted(self, tiles: NDArray[np.bool_]) -> Self:
        """Without the tiles that `tiles`, `[query tiles, key tiles]`, says are not wanted."""
        if tiles.shape != self.kinds.shape:
            raise ValueError(f"a mask of tiles {self.kinds.shape} cannot be restricted by {tiles.shape}")
        return replace(self, kinds=np.where(tiles, self.kinds, EMPTY).astype(np.uint8))

    @cached_property
    def computed(self) -> int:
        """Tiles that are not EMPTY."""
        return int(np.count_nonzero(self.kinds))

    @property
    def skipped(self) -> int:
        """Tiles that are EMPTY, those behind the last row of their queries included."""
        return self.kinds.size - self.computed

    @property
    def density(self) -> float:
        """Computed tiles, as a fraction of those that causal attention computes."""
        last = (
            self.keys - self.queries + np.minimum(np.arange(1, len(self.kinds) + 1) * TILE, self.queries) - 1
        )
        return self.computed / int((last // TILE + 1).sum())

    def lists(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The tiles to compute of each query tile, from the last key to the first.

        Returns:
            `[query tiles + 1]` where each query tile's entries begin, and the entries: key tile * 2, + 1
            where it is PARTIAL.
        """
        rows, columns = np.nonzero(self.kinds[:, ::-1])
        columns = self.kinds.shape[1] - 1 - columns
        entries = columns * 2 + (self.kinds[rows, columns] == PARTIAL)
        starts = np.searchsorted(rows, np.arange(len(self.kinds) + 1))
        return starts.astype(np.int32), entries.astype(np.int32)

    def dense(self) -> NDArray[np.bool_]:
        """`[queries, keys]`: who sees what."""
        positions = np.arange(self.keys - self.queries, self.keys)[:, None]
        key = np.arange(self.keys)
        seen = (key <= positions) & ((key >= self.low[:, None]) | (key < self.prefix))
        wanted = np.repeat(np.repeat(self.kinds != EMPTY, TILE, 0), TILE, 1)
        return seen & wanted[: self.queries, : self.keys]


def _kinds(queries: int, keys: int, prefix: int, low: NDArray[np.int32]) -> NDArray[np.uint8]:
    """The kind of every tile, from its corners: neither `low` nor positions ever fall from row to row."""
    first_row = np.arange(0, queries, TILE)[:, None]
    last_row = np.minimum(first_row + TILE, queries) - 1
    begin = np.arange(0, keys, TILE)
    end = begin + TILE
    offset = keys - queries  # position of the first row

    row = np.maximum(begin - offset, first_row)  # the first that is not before the tile's first key
    reached = row <= last_row
    band = low[np.minimum(row, last_row)] < end
    some = reached & (band | (begin < prefix))
    whole = (first_row + offset >= end - 1) & ((low[last_row] <= begin) | (end <= prefix))
    return np.where(whole, FULL, np.where(some, PARTIAL, EMPTY)).astype(np.uint8)
