"""A decode step taken down once as a CUDA graph, and launched again and again."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.arena import CudaArena
from kvrelay_kernels.cuda.batch import DeviceBatch, Singles, room, slots_of
from kvrelay_kernels.cuda.gemm import CudaLinear
from kvrelay_kernels.interface import AttentionSpec, Logits, RopeTable, Step, StepBatch

if TYPE_CHECKING:
    from kvrelay_kernels.cuda.backend import CudaBackend

NARROWEST = 16
"""Blocks of the narrowest table; wider ones are the next powers of two."""


class Recording:
    """A step for so many sequences with one row each: one graph for each width of the block tables.

    The first step of a width runs three times: to compile and measure whatever it needs, to take its memory,
    and to be taken down.
    """

    def __init__(self, backend: "CudaBackend", step: Step, arena: CudaArena) -> None:
        self._backend = backend
        self._step = step
        self._arena = arena
        self._takes: dict[int, Take] = {}

    def __call__(self, batch: StepBatch) -> Logits:
        """The logits of a step, `[rows, vocabulary]`; overwritten by the next call."""
        self._backend.stream.use()
        self._arena.settle(self._backend.stream)
        width = table_width(batch.block_tables.shape[1])
        arrays = step_arrays(batch, width)
        if width not in self._takes:
            self._takes[width] = Take(self._backend, self._step, batch, arrays, self._stand_in)
        take = self._takes[width]
        take.check_ids(batch.token_ids)
        take.launch(arrays)
        self._backend.stream.synchronize()
        return take.result

    def _stand_in(self, batch: DeviceBatch, ids: Any) -> "StandIn":
        return StandIn(self._backend, batch, ids)


def table_width(blocks: int) -> int:
    """The width of table that steps whose tables have `blocks` are filled up to."""
    return max(NARROWEST, 1 << (blocks - 1).bit_length())


def step_arrays(batch: StepBatch, width: int, rows: int | None = None) -> list[NDArray[np.int32]]:
    """What changes between launches: ids, positions, slots, row starts, lengths and tables of a `plain` step.

    Tables become `width` blocks wide. Rows are filled up to `rows` with ones that are nobody's: without a
    slot (-1) and without keys.
    """
    rows = batch.rows if rows is None else rows
    tables = np.zeros((rows, width), np.int32)
    tables[: batch.rows, : batch.block_tables.shape[1]] = batch.block_tables
    return [
        filled(batch.token_ids, rows),
        filled(batch.positions, rows),
        filled(slots_of(batch), rows, -1),
        np.arange(rows + 1, dtype=np.int32),
        filled(batch.lengths, rows),
        tables,
    ]


def filled(array: NDArray[np.int32], count: int, value: int = 0) -> NDArray[np.int32]:
    """The array, and `value` from there on up to `count` elements."""
    whole = np.full(count, value, np.int32)
    whole[: len(array)] = array
    return whole


class Take:
    """One graph and the arrays that change between its launches."""

    def __init__(
        self,
        backend: "CudaBackend",
        step: Step,
        batch: StepBatch,
        arrays: Sequence[NDArray[np.int32]],
        stand_in: Callable[..., "StandIn"],
    ) -> None:
        """`arrays` are those of `step_arrays`, and what else `stand_in` takes behind a batch and its ids."""
        import cupy  # pyright: ignore[reportMissingImports]

        self._backend = backend
        self._memory = cupy.empty(sum(map(room, arrays)), np.int32)
        there = backend.uploads.send(arrays, self._memory)
        ids, positions, slots, starts, lengths, tables, *more = there
        singles = Singles(None, lengths, tables, batch.sequences)
        taker = stand_in(DeviceBatch(batch, positions, slots, starts, lengths, tables, singles), ids, *more)
        step(taker, batch)
        # What a graph works in is given to other graphs alone: they write before they read.
        with cupy.cuda.using_allocator(backend.recorded.malloc):
            taker.again()
            step(taker, batch)
            backend.stream.synchronize()
            taker.again()
            backend.stream.begin_capture()
            try:
                self.result: Any = step(taker, batch)
            finally:
                self._graph = backend.stream.end_capture()
        self._table = taker.table

    def check_ids(self, token_ids: NDArray[np.int32]) -> None:
        """Raises IndexError for an id outside the vocabulary."""
        if self._table is not None:
            self._table.check_rows(token_ids)

    def launch(self, arrays: Sequence[NDArray[np.int32]]) -> None:
        """Upload a step's arrays and launch, without waiting; `result` is what the step gave once."""
        self._backend.uploads.fill(self._memory, arrays)
        self._graph.launch(self._backend.stream)


class StandIn:
    """The backend, for a batch that lies on the device already and changes there between launches."""

    def __init__(self, backend: "CudaBackend", batch: DeviceBatch, ids: Any) -> None:
        self.backend = backend
        self.batch = batch
        self.ids = ids
        self._host: Logits | None = None
        self.table: CudaLinear | None = None
        self.rms_norm, self.add_rms_norm = backend.rms_norm, backend.add_rms_norm
        self.linear, self.gate = backend.linear, backend.gate

    def again(self) -> None:
        """Begin the same step anew: what is planned once a step has to be planned again."""
        self.batch = replace(self.batch)

    def embed(self, table: CudaLinear, token_ids: NDArray[np.int32], scale: float) -> Any:
        """As the backend's, of the ids that lie on the device."""
        table.check_rows(token_ids)
        self.table = table
        return self.backend.embed_there(table, self.ids, scale)

    def rope_append(
        self, qkv: Any, batch: StepBatch, arena: CudaArena, layer: int, spec: AttentionSpec, rope: RopeTable,
        norms: tuple[Any, Any, float] | None,
    ) -> Any:  # fmt: skip
        """As the backend's."""
        return self.backend.append_there(qkv, self.batch, arena, layer, spec, rope, norms)

    def attention(self, q: Any, batch: StepBatch, arena: CudaArena, layer: int, spec: AttentionSpec) -> Any:
        """As the backend's."""
        return self.backend.attend_there(q, self.batch, arena, layer, spec)

    def logits(self, x: Any, head: CudaLinear, rows: NDArray[np.int32]) -> Any:
        """As the backend's, of all rows, but without waiting."""
        import cupyx  # pyright: ignore[reportMissingImports]

        host = self._host
        if host is None:
            host = self._host = cupyx.empty_pinned((len(rows), head.n), np.float32)
        return self.backend.logits_there(x, head, host)
