"""A step's batch on the device: every array uploaded once, in one asynchronous copy."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.interface import StepBatch
from kvrelay_kernels.quant import BLOCK_TOKENS

ALIGNMENT = 32
"""Elements: arrays of an upload begin at multiples of 128 bytes."""
SMALLEST = 4096
"""Elements: sizes are rounded up to powers of two from here on, so that the pool meets few of them."""


@dataclass(frozen=True)
class Singles:
    """The sequences that are not prompts: one row each."""

    rows: Any
    """`[n]` int32 on the device: their rows in the step. None where they are all rows, in order."""
    lengths: Any
    """`[n]` int32 on the device, the new row included."""
    block_tables: Any
    """`[n, blocks]` int32 on the device."""
    count: int


@dataclass(frozen=True)
class DeviceBatch:
    """One step's arrays on the device, int32, beside the host's copies.

    They are valid until the step's work has run on the backend's stream, in whose order they were uploaded.
    """

    host: StepBatch
    positions: Any
    """`[rows]`"""
    slots: Any
    """`[rows]`: where each row's K and V go: arena block * 64 + token in the block."""
    row_starts: Any
    """`[sequences + 1]`"""
    lengths: Any
    """`[sequences]`: keys of each sequence, its new rows included."""
    block_tables: Any
    """`[sequences, blocks]`, rows contiguous; entries past a length are never read."""
    singles: Singles | None
    """The sequences that are not prompts; None where there are none."""

    @property
    def rows(self) -> int:
        """New tokens in this step."""
        return self.host.rows

    @property
    def sequences(self) -> int:
        """Sequences in this step."""
        return self.host.sequences


def slots_of(batch: StepBatch) -> NDArray[np.int32]:
    """`[rows]`: arena block * 64 + token of each row."""
    sequence = np.repeat(np.arange(batch.sequences), np.diff(batch.row_starts))
    blocks = batch.block_tables[sequence, batch.positions // BLOCK_TOKENS]
    return blocks * np.int32(BLOCK_TOKENS) + batch.positions % BLOCK_TOKENS


class Uploads:
    """int32 arrays on their way to the device: pinned memory in turn, one asynchronous copy a call."""

    def __init__(self, turns: int = 16) -> None:
        self._pinned: list[NDArray[np.int32]] = [np.empty(0, np.int32)] * turns
        self._copied: list[Any] = [None] * turns
        self._turn = 0

    def send(self, arrays: Sequence[NDArray[np.int32]], into: Any = None) -> list[Any]:
        """Copy `arrays` to the device on CuPy's current stream; gives them as views of one buffer there.

        `into` is a flat int32 buffer on the device that is large enough; None: a new one.
        """
        import cupy  # pyright: ignore[reportMissingImports]

        starts = _starts(arrays)
        device = cupy.empty(capacity(starts[-1]), np.int32) if into is None else into
        self.fill(device, arrays)
        return [
            device[start : start + array.size].reshape(array.shape)
            for array, start in zip(arrays, starts, strict=False)
        ]

    def fill(self, device: Any, arrays: Sequence[NDArray[np.int32]]) -> None:
        """Copy `arrays` into a flat buffer where `send` puts such arrays, on CuPy's current stream."""
        import cupy  # pyright: ignore[reportMissingImports]

        starts = _starts(arrays)
        pinned = self._next(starts[-1])
        for array, start in zip(arrays, starts, strict=False):
            pinned[start : start + array.size] = array.reshape(-1)
        stream = cupy.cuda.get_current_stream()
        device.data.copy_from_host_async(pinned.ctypes.data, 4 * starts[-1], stream)
        self._copied[self._turn].record(stream)

    def _next(self, total: int) -> NDArray[np.int32]:
        """The next turn's pinned memory, once the copy that used it last has run."""
        import cupy  # pyright: ignore[reportMissingImports]
        import cupyx  # pyright: ignore[reportMissingImports]

        self._turn = (self._turn + 1) % len(self._pinned)
        if self._copied[self._turn] is None:
            self._copied[self._turn] = cupy.cuda.Event(disable_timing=True)
        self._copied[self._turn].synchronize()
        if len(self._pinned[self._turn]) < total:
            self._pinned[self._turn] = cupyx.empty_pinned(capacity(total), np.int32)
        return self._pinned[self._turn]


def _starts(arrays: Sequence[NDArray[np.int32]]) -> list[int]:
    """Where in a buffer each array begins, and where they end."""
    return list(accumulate(map(room, arrays), initial=0))


def room(array: NDArray[np.int32]) -> int:
    """Elements that an array takes in an upload."""
    return -(-array.size // ALIGNMENT) * ALIGNMENT


def capacity(size: int) -> int:
    """The power of two, from `SMALLEST` on, that holds `size` elements."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


def upload_batch(batch: StepBatch, uploads: Uploads) -> DeviceBatch:
    """Put a step's arrays on the device, on CuPy's current stream."""
    single = ~batch.prompts
    arrays = [batch.positions, slots_of(batch), batch.row_starts, batch.lengths, batch.block_tables]
    some = single.any() and not single.all()
    if some:
        arrays += [batch.row_starts[:-1][single], batch.lengths[single], batch.block_tables[single]]
    positions, slots, row_starts, lengths, tables, *apart = uploads.send(arrays)
    singles = None
    if some:
        singles = Singles(*apart, count=int(single.sum()))
    elif single.any():
        singles = Singles(None, lengths, tables, batch.sequences)
    return DeviceBatch(batch, positions, slots, row_starts, lengths, tables, singles)
