"""Steps that are told to a device one behind the other, and what it has to find of each."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.batch import slots_of
from kvrelay_kernels.cuda.step_rows import MOST_TOLD, StepRows
from kvrelay_kernels.interface import FROM_DEVICE, NOWHERE
from model_runtime.steps import sequence_steps

ROWS, WIDTH = MOST_TOLD + 40, 16
"""Of the largest step: more rows than one launch tells of."""


def tell_steps(there: StepRows) -> Iterator[dict[str, Any]]:
    """Tell steps of several sizes to the arrays of a step of ROWS and WIDTH: what is wanted in each array."""
    rng = np.random.default_rng(9)
    for count, blocks in ((ROWS, 3), (ROWS, 3), (7, 2), (ROWS - 1, WIDTH), (MOST_TOLD + 1, WIDTH)):
        positions = rng.integers(0, 64 * blocks, count)
        ids, places = rng.integers(0, 2**17, count), rng.permutation(count).astype(np.int32)
        ids[::3], places[::6] = FROM_DEVICE, NOWHERE
        ids[::6] = 5
        batch, _ = sequence_steps([1] * count, positions.tolist(), ids.tolist())
        tables = rng.integers(0, 2**20, (count, blocks)).astype(np.int32)
        batch = replace(batch, block_tables=tables)
        there.tell(batch, places, count)
        nobodys = ROWS - count
        wanted = {
            "ids": [*np.where(ids == FROM_DEVICE, ~places, ids), *[0] * nobodys],
            "positions": [*positions, *[0] * nobodys],
            "slots": [*slots_of(batch), *[-1] * nobodys],
            "lengths": [*(positions + 1), *[0] * nobodys],
            "places": [*places, *[NOWHERE] * nobodys],
            "row_starts": [*range(ROWS + 1)],
            "answer": [count],
        }
        wanted["tables"] = tables.copy()
        # What a step is told is taken when it is told.
        tables[:], places[:] = 0, 0
        yield wanted


def check_told(there: StepRows, wanted: dict[str, Any], read: Callable[[Any], NDArray[np.int32]]) -> None:
    """Compare; `read` gives an array that lies on the device."""
    tables = wanted.pop("tables")
    assert np.array_equal(read(there.tables)[: tables.shape[0], : tables.shape[1]], tables)
    for name, values in wanted.items():
        assert np.array_equal(read(getattr(there, name)), values), name
