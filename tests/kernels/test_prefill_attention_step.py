"""What prefill attention lays out on the host: lists of tiles, the blocks they read, steps for cuDNN."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay_kernels.block_mask import TILE, BlockMask
from kvrelay_kernels.cuda.block_sparse import SparseProblem
from kvrelay_kernels.cuda.cudnn_attention import CudnnProblem, bucket, pad_step
from kvrelay_kernels.cuda.prefill_attention_step import lay_out_step, prompt_masks
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import AttentionSpec, StepBatch
from kvrelay_kernels.plans import DeviceClass
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout, parse_format

lengths = st.integers(1, 900).flatmap(
    lambda keys: st.tuples(st.integers(1, keys), st.just(keys), st.booleans())
)
sequences = st.lists(lengths, min_size=1, max_size=5).filter(lambda found: any(read for *_, read in found))


def make_step(found: Sequence[tuple[int, int, bool]], blocks: int = 1000) -> StepBatch:
    """A step of `(new tokens, length, prompt)` sequences, whose blocks lie anywhere and may be shared."""
    counts = np.array([count if read else 1 for count, _, read in found], np.int32)
    keys = np.array([length for _, length, _ in found], np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    positions = [np.arange(n - c, n) for c, n in zip(counts, keys, strict=True)]
    rng = np.random.default_rng(int(keys.sum()))
    shape = len(keys), -(-int(keys.max()) // BLOCK_TOKENS) + 1
    return StepBatch(
        np.zeros(int(starts[-1]), np.int32),
        np.concatenate(positions).astype(np.int32),
        starts,
        keys,
        rng.integers(0, blocks, shape, np.int32),
        starts[1:] - np.int32(1),
        np.array([read for *_, read in found]),
    )


@given(found=sequences, window=st.none() | st.integers(1, 500))
def test_items_name_every_row_and_tile_of_the_prompts(
    found: list[tuple[int, int, bool]], window: int | None
) -> None:
    batch = make_step(found)
    masks = prompt_masks(batch, window)
    work = lay_out_step(batch, masks).work
    assert (np.diff(work.items[:, 5]) <= 0).all()
    assert work.computed == len(work.entries) == sum(mask.computed for mask in masks.values())
    width, met = batch.block_tables.shape[1], np.zeros(batch.rows, np.int32)
    for row, rows, position, table, first, tiles, prefix, length in work.items.tolist():
        s = table // width
        mask, inside = masks[s], row - int(batch.row_starts[s])
        met[row : row + rows] += 1
        assert position == batch.positions[row]
        assert (prefix, length) == (mask.prefix, batch.lengths[s])
        kinds = mask.kinds[inside // TILE]
        entries = work.entries[first : first + tiles]
        assert np.array_equal(entries // 2, np.flatnonzero(kinds)[::-1])
        assert np.array_equal(entries % 2 == 1, kinds[entries // 2] == 1)
        assert np.array_equal(work.low[row : row + rows], mask.low[inside : inside + rows])
    assert np.array_equal(met, np.repeat(batch.prompts, np.diff(batch.row_starts)))


@given(found=sequences, window=st.none() | st.integers(1, 500), blocks=st.sampled_from([7, 1000]))
def test_every_block_that_is_read_is_a_source_once(
    found: list[tuple[int, int, bool]], window: int | None, blocks: int
) -> None:
    batch = make_step(found, blocks)
    masks = prompt_masks(batch, window)
    layout = lay_out_step(batch, masks)
    arena, tokens = layout.sources.T
    assert len(np.unique(arena)) == len(arena) <= blocks
    used = np.zeros(len(arena), np.bool_)
    for s, mask in masks.items():
        for tile in np.flatnonzero(mask.kinds.any(0)):
            for block in range(2 * tile, min(2 * tile + 2, -(-mask.keys // BLOCK_TOKENS))):
                source = layout.tables[s, block]
                used[source] = True
                assert arena[source] == batch.block_tables[s, block]
                assert tokens[source] >= min(BLOCK_TOKENS, mask.keys - block * BLOCK_TOKENS)
    assert used.all()


def test_windows_read_few_blocks() -> None:
    batch = make_step([(100, 5000, True)], 10**6)
    layout = lay_out_step(batch, prompt_masks(batch, 200))
    assert len(layout.sources) == len(range(4608 // 64, -(-5000 // 64)))


def test_masks_have_to_fit() -> None:
    batch = make_step([(10, 20, True), (3, 9, True)])
    given_mask = BlockMask.causal(3, 9, 2)
    assert prompt_masks(batch, None, {1: given_mask})[1] is given_mask
    assert np.array_equal(prompt_masks(batch, None, {1: given_mask})[0].kinds, [[1]])
    with pytest.raises(ValueError, match="does not fit sequence 0"):
        prompt_masks(batch, None, {0: given_mask})


@given(found=sequences)
def test_padded_steps_hold_the_prompts(found: list[tuple[int, int, bool]]) -> None:
    batch = make_step(found)
    step = pad_step(batch, batch.block_tables, 256)
    prompts = batch.prompt_numbers
    n = len(prompts)
    assert len(step.rows) == bucket(n)
    assert np.array_equal(step.rows[:n], np.diff(batch.row_starts)[prompts])
    assert np.array_equal(step.keys[:n], batch.lengths[prompts])
    assert np.array_equal(step.offsets[:n], batch.row_starts[prompts] * 256)
    assert not step.rows[n:].any()
    assert not step.keys[n:].any()
    assert step.most_rows >= step.rows.max()
    assert step.most_keys >= step.keys.max()
    for i, s in enumerate(prompts):
        blocks = -(-int(batch.lengths[s]) // BLOCK_TOKENS)
        assert np.array_equal(step.tables[i, :blocks], batch.block_tables[s, :blocks])


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 1025)] == [1, 2, 4, 4, 8, 2048]
    assert bucket(3, 256) == 256


def test_plans_are_told_apart_by_all_that_decides_them() -> None:
    def key(
        window: int | None = None,
        fmt: str = "bfloat16",
        blocks: int = 64,
        rows: int = 128,
        scale: float = 0.1,
    ) -> str:
        layout = BlockLayout(parse_format("none", 128, fmt), 8, 128)  # pyright: ignore[reportArgumentType]
        problem = CudnnProblem(AttentionSpec(32, 8, 128, scale, window), layout, blocks, 1, rows, 256)
        return problem.graph_key(DeviceClass((9, 0), 132), {"cudnn": "1"}).name

    keys = [key(), key(64), key(65), key(fmt="float16"), key(blocks=65), key(rows=256), key(scale=0.2)]
    assert len(set(keys)) == len(keys)
    assert key() == key()


def test_problems_that_no_kernel_runs() -> None:
    with pytest.raises(FormatUnsupported, match="head dimensions"):
        SparseProblem(8, 8, 160, "float16")
    with pytest.raises(FormatUnsupported, match="cannot share"):
        SparseProblem(9, 2, 64, "float16")
