"""One decode step's rows: the newest token of each sequence."""

from collections.abc import Sequence

import numpy as np

from decode_service.slot import Slot
from kvrelay_kernels.interface import FROM_DEVICE, StepBatch


def step_batch(slots: Sequence[Slot]) -> StepBatch:
    """A row a sequence; its token is the newest one, whose key and value are not yet in the arena.

    Where that token is still being drawn, only the device has it.
    """
    lengths = np.array([slot.length + slot.ahead for slot in slots], np.int32)
    tables = np.zeros((len(slots), max(len(slot.blocks) for slot in slots)), np.int32)
    for table, slot in zip(tables, slots, strict=True):
        table[: len(slot.blocks)] = slot.blocks
    return StepBatch(
        token_ids=np.array([FROM_DEVICE if slot.ahead else slot.answer_ids[-1] for slot in slots], np.int32),
        positions=lengths - 1,
        row_starts=np.arange(len(slots) + 1, dtype=np.int32),
        lengths=lengths,
        block_tables=tables,
        logit_rows=np.arange(len(slots), dtype=np.int32),
    )
