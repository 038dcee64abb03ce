"""One step's rows, from the chunks that the scheduler chose."""

from collections.abc import Iterator, Sequence

import numpy as np

from kvrelay_kernels.interface import StepBatch
from prefill_service.job import PrefillJob
from prefill_service.scheduler import Chunk


def step_batch(chunks: Sequence[Chunk[PrefillJob]]) -> StepBatch:
    """The chunks' rows behind each other.

    Logits are wanted of the last row of each job that ends here. Tokens that were answered before a fault
    come as decode computed them: each a sequence of one row, on its job's blocks.
    """
    spans = [(chunk.prompt, start, end) for chunk in chunks for start, end in _spans(chunk)]
    tables = np.zeros((len(spans), max(len(job.blocks) for job, _, _ in spans)), np.int32)
    for table, (job, _, _) in zip(tables, spans, strict=True):
        table[: len(job.blocks)] = job.blocks
    ends = [chunk.tokens == chunk.prompt.remaining for chunk in chunks]
    last_rows = np.cumsum([chunk.tokens for chunk in chunks]) - 1
    return StepBatch(
        token_ids=np.concatenate([job.token_ids[start:end] for job, start, end in spans]),
        positions=np.concatenate([np.arange(start, end, dtype=np.int32) for _, start, end in spans]),
        row_starts=np.cumsum([0, *(end - start for _, start, end in spans)]).astype(np.int32),
        lengths=np.array([end for _, _, end in spans], np.int32),
        block_tables=tables,
        logit_rows=last_rows[ends].astype(np.int32),
        read=np.array([end <= job.prompt_tokens for job, _, end in spans]),
    )


def _spans(chunk: Chunk[PrefillJob]) -> Iterator[tuple[int, int]]:
    job = chunk.prompt
    start, end = job.computed, job.computed + chunk.tokens
    prompt_end = min(end, job.prompt_tokens)
    if start < prompt_end:
        yield start, prompt_end
    for position in range(max(start, prompt_end), end):
        yield position, position + 1
