"""One decode step's rows: the newest token of each sequence."""

import numpy as np
from numpy.typing import NDArray

from decode_service.slot import Slot
from kvrelay_kernels.interface import FROM_DEVICE, StepBatch


class StepBatches:
    """Makes the batches of steps. Until sequences come or go, all have the same block tables."""

    def __init__(self) -> None:
        self._slots: tuple[Slot, ...] = ()
        self._tables: NDArray[np.int32] = block_tables(())
        self._every: NDArray[np.int32] = np.arange(1, dtype=np.int32)

    def __call__(self, slots: tuple[Slot, ...]) -> StepBatch:
        """A row a sequence; its token is the newest one, whose key and value are not yet in the arena.

        Where that token is still being drawn, only the device has it.
        """
        if slots != self._slots:
            self._slots, self._tables = slots, block_tables(slots)
            self._every = np.arange(len(slots) + 1, dtype=np.int32)
        ids = [FROM_DEVICE if slot.ahead else slot.answer_ids[-1] for slot in slots]
        lengths = np.array([slot.length + slot.ahead for slot in slots], np.int32)
        return StepBatch(
            token_ids=np.array(ids, np.int32),
            positions=lengths - 1,
            row_starts=self._every,
            lengths=lengths,
            block_tables=self._tables,
            logit_rows=self._every[:-1],
        )


def block_tables(slots: tuple[Slot, ...]) -> NDArray[np.int32]:
    """`[slots, blocks of the longest]`, filled up with zeros."""
    tables = np.zeros((len(slots), max((len(slot.blocks) for slot in slots), default=0)), np.int32)
    for table, slot in zip(tables, slots, strict=True):
        table[: len(slot.blocks)] = slot.blocks
    return tables
