"""Masks by tiles against masks by elements."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvrelay_kernels.block_mask import EMPTY, FULL, PARTIAL, TILE, BlockMask

Shape = tuple[int, int]
shapes = st.integers(1, 700).flatmap(lambda keys: st.tuples(st.integers(1, keys), st.just(keys)))
windows = st.none() | st.integers(1, 800)
prefixes = st.integers(0, 500)


def seen_by_elements(shape: Shape, low: NDArray[np.int64], prefix: int) -> NDArray[np.bool_]:
    """Row by row, as one would say it."""
    queries, keys = shape
    seen = np.zeros(shape, np.bool_)
    for row in range(queries):
        position = keys - queries + row
        seen[row, low[row] : position + 1] = True
        seen[row, : min(prefix, position + 1)] = True
    return seen


def check(mask: BlockMask, seen: NDArray[np.bool_]) -> None:
    """Every tile is what its elements say, and every row has its keys."""
    assert np.array_equal(mask.dense(), seen)
    for i, j in np.ndindex(mask.kinds.shape):
        tile = seen[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE]
        whole = tile.all() and (j + 1) * TILE <= mask.keys
        assert mask.kinds[i, j] == (FULL if whole else PARTIAL if tile.any() else EMPTY)


@given(shape=shapes, window=windows, sinks=prefixes)
def test_windows_and_sinks(shape: Shape, window: int | None, sinks: int) -> None:
    queries, keys = shape
    positions = np.arange(keys - queries, keys)
    low = np.maximum(positions - (window or keys) + 1, 0)
    check(BlockMask.causal(queries, keys, window, sinks), seen_by_elements(shape, low, sinks))


@given(shape=shapes, cuts=st.sets(st.integers(1, 700), max_size=6), shared=prefixes)
def test_documents_and_shared_prefix(shape: Shape, cuts: set[int], shared: int) -> None:
    queries, keys = shape
    starts = np.array([0, *sorted(cuts)], np.int32)
    low = np.array([starts[starts <= p].max() for p in range(keys - queries, keys)])
    check(BlockMask.documents(queries, keys, starts, shared), seen_by_elements(shape, low, shared))


@given(shape=shapes, window=windows, seed=st.integers(0, 2**32 - 1))
def test_any_tiles(shape: Shape, window: int | None, seed: int) -> None:
    mask = BlockMask.causal(*shape, window)
    wanted = np.random.default_rng(seed).random(mask.kinds.shape) < 0.5
    restricted = mask.restricted(wanted)
    elements = np.repeat(np.repeat(wanted, TILE, 0), TILE, 1)[: shape[0], : shape[1]]
    assert np.array_equal(restricted.dense(), mask.dense() & elements)
    assert restricted.computed == (restricted.kinds != EMPTY).sum()
    assert restricted.computed + restricted.skipped == mask.kinds.size


@given(shape=shapes, window=windows, seed=st.integers(0, 2**32 - 1))
def test_lists_say_what_the_tiles_say(shape: Shape, window: int | None, seed: int) -> None:
    mask = BlockMask.causal(*shape, window)
    mask = mask.restricted(np.random.default_rng(seed).random(mask.kinds.shape) < 0.7)
    starts, entries = mask.lists()
    kinds = np.zeros_like(mask.kinds)
    for i in range(len(kinds)):
        tiles = entries[starts[i] : starts[i + 1]] // 2
        assert (np.diff(tiles) < 0).all()
        kinds[i, tiles] = np.where(entries[starts[i] : starts[i + 1]] % 2, PARTIAL, FULL)
    assert np.array_equal(kinds, mask.kinds)
    assert starts[-1] == len(entries) == mask.computed


@given(keys=st.integers(1, 700), cut=st.integers(1, 700), window=windows, sinks=prefixes)
def test_a_chunk_sees_what_its_rows_see_in_the_whole(
    keys: int, cut: int, window: int | None, sinks: int
) -> None:
    queries = min(cut, keys)
    whole = BlockMask.causal(keys, keys, window, sinks).dense()
    assert np.array_equal(BlockMask.causal(queries, keys, window, sinks).dense(), whole[keys - queries :])


def test_counts() -> None:
    mask = BlockMask.causal(1024, 1024)
    assert (mask.computed, mask.skipped, mask.density) == (36, 28, 1.0)
    assert (mask.kinds == PARTIAL).sum() == 8
    window = BlockMask.causal(8192, 8192, 1024)
    assert window.computed == sum(min(i, 8) + 1 for i in range(64))
    assert window.density == window.computed / (64 * 65 // 2)


def test_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="queries"):
        BlockMask.causal(5, 4)
    with pytest.raises(ValueError, match="queries"):
        BlockMask.causal(0, 4)
    with pytest.raises(ValueError, match="restricted"):
        BlockMask.causal(200, 200).restricted(np.ones((1, 2), np.bool_))
