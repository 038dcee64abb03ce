"""Building and cutting the batches that a decoder's step takes."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.interface import StepBatch
from kvrelay_kernels.quant import BLOCK_TOKENS


def sequence_steps(
    new_tokens: Sequence[int], past: Sequence[int], token_ids: Sequence[int] | None = None
) -> tuple[StepBatch, int]:
    """A step of sequences with so many new tokens behind so many past ones, and the blocks it needs.

    Blocks are dealt out one sequence behind the other; logits are those of each sequence's last row.
    `token_ids` are all new tokens, zeros where it is None.
    """
    counts = np.asarray(new_tokens, np.int32)
    lengths = counts + np.asarray(past, np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    blocks = -(-lengths // BLOCK_TOKENS)
    tables = np.zeros((len(counts), int(blocks.max(initial=1))), np.int32)
    for row, (first, count) in enumerate(zip(np.cumsum(blocks) - blocks, blocks, strict=True)):
        tables[row, :count] = np.arange(first, first + count)
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)])
    ids = np.zeros(int(starts[-1]), np.int32) if token_ids is None else np.asarray(token_ids, np.int32)
    batch = StepBatch(ids, positions.astype(np.int32), starts, lengths, tables, starts[1:] - np.int32(1))
    return batch, int(blocks.sum())


def only_rows(batch: StepBatch) -> tuple[list[int] | None, StepBatch, NDArray[np.int32]]:
    """Cut a batch to the rows whose logits are wanted, where that leaves a step like any other.

    Returns the rows kept (None: all of them), the batch of those rows, and its `logit_rows`. A step's
    rows are the last ones of their sequences, so only such rows can be kept alone.
    """
    wanted = np.unique(batch.logit_rows)
    ends = batch.row_starts[1:]
    firsts = np.searchsorted(wanted, batch.row_starts[:-1])
    counts = np.searchsorted(wanted, ends) - firsts
    # The last `counts` rows of each sequence; where others are wanted the step stays as it is.
    suffixes = [np.arange(end - count, end) for end, count in zip(ends, counts, strict=True) if count]
    if len(wanted) == batch.rows or not np.array_equal(np.concatenate(suffixes), wanted):
        return None, batch, batch.logit_rows
    sequences = np.flatnonzero(counts)
    rows = np.searchsorted(wanted, batch.logit_rows).astype(np.int32)
    cut = dataclasses.replace(
        batch,
        token_ids=batch.token_ids[wanted],
        positions=batch.positions[wanted],
        row_starts=np.concatenate([[0], np.cumsum(counts[sequences])]).astype(np.int32),
        lengths=batch.lengths[sequences],
        block_tables=batch.block_tables[sequences],
        logit_rows=rows,
        read=batch.prompts[sequences],
    )
    return wanted.tolist(), cut, rows
