"""A decode step's arrays on the device, and how the host tells them from step to step."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.batch import Uploads
from kvrelay_kernels.cuda.module import KernelCache, KernelKey
from kvrelay_kernels.interface import NOWHERE, StepBatch

MOST_TOLD = 256
"""Rows that one launch tells of: of a kernel's parameters, 4 KB, they take 3."""
NOBODYS = (0, -1, NOWHERE)
"""Token, position and place of a row that fills a step up."""


def step_rows_key(arch: str) -> KernelKey:
    """The kernel that writes a step's arrays."""
    return KernelKey.of("step_rows", {"ROWS": MOST_TOLD}, arch)


class StepRows:
    """What changes between launches of a recorded step of so many rows, with tables of so many blocks.

    Each row's few words travel as parameters of one kernel, which the driver copies when it is told: no
    memory of the host is read later, nothing is copied behind it. Tables change when sequences come and go;
    only then are they uploaded.
    """

    def __init__(self, rows: int, width: int, arch: str, kernels: KernelCache, uploads: Uploads) -> None:
        """Arrays of nobody's rows on CuPy's current stream. Raises MemoryError."""
        import cupy  # pyright: ignore[reportMissingImports]

        self.rows = rows
        self.ids: Any = cupy.zeros(rows, np.int32)
        """`[rows]`, as all others; ~place stands for the newest token there."""
        self.positions: Any = cupy.zeros(rows, np.int32)
        self.slots: Any = cupy.zeros(rows, np.int32)
        self.lengths: Any = cupy.zeros(rows, np.int32)
        self.places: Any = cupy.zeros(rows, np.int32)
        self.answer: Any = cupy.zeros(1, np.int32)
        """Where the step's tokens belong: see `tell`."""
        self._uploads = uploads
        self._on_host = np.zeros((rows, width), np.int32)
        """The tables as they were told last; what lies past a sequence's length may be older."""
        starts = np.arange(rows + 1, dtype=np.int32)
        self.row_starts, self.tables = uploads.send([starts, self._on_host])
        self._told = np.empty((-(-rows // MOST_TOLD) * MOST_TOLD, len(NOBODYS)), np.int32)
        self._kernel = kernels.load(step_rows_key(arch), 0)

    def tell(self, batch: StepBatch, places: NDArray[np.int32], answer: int = 0) -> None:
        """Write the arrays of a `plain` step, on CuPy's current stream; does not wait.

        Rows are filled up with ones that are nobody's. A row's length is its position and one more.

        Args:
            batch: up to so many rows, with tables of up to so many blocks. FROM_DEVICE, where a row has a
                place, is the newest token there.
            places: of each row, or NOWHERE.
            answer: what the device finds in `self.answer`.
        """
        count, blocks = batch.block_tables.shape
        known = self._on_host[:count, :blocks]
        if not np.array_equal(known, batch.block_tables):
            known[:] = batch.block_tables
            self._uploads.fill(self.tables, [self._on_host])
        told = self._told
        told[:count, 0], told[:count, 1], told[:count, 2] = batch.token_ids, batch.positions, places
        told[count:] = NOBODYS
        rows, width, answer_word = np.int32(self.rows), np.int32(self.tables.shape[1]), np.int32(answer)
        for first in range(0, self.rows, MOST_TOLD):
            part = np.void(told[first : first + MOST_TOLD].tobytes())
            self._kernel(
                (1,), (MOST_TOLD,),
                (
                    part, np.int32(first), rows, self.tables, width, answer_word, self.ids, self.positions,
                    self.slots, self.lengths, self.places, self.answer,
                ),
            )  # fmt: skip
