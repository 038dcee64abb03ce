"""One step's rows, from the chunks that the scheduler chose."""

from collections.abc import Sequence

import numpy as np
from kvrelay_kernels.interface import StepBatch

from prefill_service.job import PrefillJob
from prefill_service.scheduler import Chunk


def step_batch(chunks: Sequence[Chunk[PrefillJob]]) -> StepBatch:
    """The chunks' rows behind each other; logits are wanted of the last row of each prompt that ends here."""
    jobs = [chunk.prompt for chunk in chunks]
    spans = [(chunk.prompt.computed, chunk.prompt.computed + chunk.tokens) for chunk in chunks]
    starts = np.concatenate([[0], np.cumsum([chunk.tokens for chunk in chunks])]).astype(np.int32)
    ends = [chunk.tokens == chunk.prompt.remaining for chunk in chunks]
    tables = np.zeros((len(jobs), max(len(job.blocks) for job in jobs)), np.int32)
    for table, job in zip(tables, jobs, strict=True):
        table[: len(job.blocks)] = job.blocks
    return StepBatch(
        token_ids=np.concatenate([job.token_ids[a:b] for job, (a, b) in zip(jobs, spans, strict=True)]),
        positions=np.concatenate([np.arange(a, b, dtype=np.int32) for a, b in spans]),
        row_starts=starts,
        lengths=np.array([end for _, end in spans], np.int32),
        block_tables=tables,
        logit_rows=(starts[1:] - 1)[ends].astype(np.int32),
    )
