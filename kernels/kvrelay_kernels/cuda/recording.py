"""A decode step taken down once as a CUDA graph, and launched again and again."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.arena import CudaArena
from kvrelay_kernels.cuda.batch import DeviceBatch, Singles
from kvrelay_kernels.cuda.gemm import CudaLinear
from kvrelay_kernels.cuda.step_rows import StepRows
from kvrelay_kernels.interface import NOWHERE, AttentionSpec, Logits, RopeTable, Step, StepBatch

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
        if width not in self._takes:
            there = self._backend.new_step_rows(batch.rows, width)
            self._takes[width] = Take(self._backend, self._step, batch, there, self._stand_in)
        take = self._takes[width]
        take.check_ids(batch.token_ids)
        take.there.tell(batch, nowhere(batch.rows))
        take.launch()
        self._backend.stream.synchronize()
        return take.result

    def _stand_in(self, batch: DeviceBatch, there: StepRows) -> "StandIn":
        return StandIn(self._backend, batch, there.ids)


def table_width(blocks: int) -> int:
    """The width of table that steps whose tables have `blocks` are filled up to."""
    return max(NARROWEST, 1 << (blocks - 1).bit_length())


def nowhere(rows: int) -> NDArray[np.int32]:
    """Places of rows that the device draws nothing for."""
    return np.full(rows, NOWHERE, np.int32)


def shape_of(rows: int, width: int) -> StepBatch:
    """What the host is told of a step that is taken down: nothing but its shape."""
    zeros, every = np.zeros(rows, np.int32), np.arange(rows + 1, dtype=np.int32)
    return StepBatch(zeros, zeros, every, zeros, np.zeros((rows, width), np.int32), every[:-1])


class Take:
    """One graph and the arrays that change between its launches."""

    def __init__(
        self,
        backend: "CudaBackend",
        step: Step,
        batch: StepBatch,
        there: StepRows,
        stand_in: Callable[[DeviceBatch, StepRows], "StandIn"],
    ) -> None:
        """What runs before the first launch is `batch`, but for its tokens, and draws for nobody."""
        import cupy  # pyright: ignore[reportMissingImports]

        self._backend = backend
        self.there = there
        there.tell(replace(batch, token_ids=np.zeros_like(batch.token_ids)), nowhere(batch.rows))
        shape = shape_of(*there.tables.shape)
        singles = Singles(None, there.lengths, there.tables, shape.sequences)
        taker = stand_in(
            DeviceBatch(
                shape, there.positions, there.slots, there.row_starts, there.lengths, there.tables, singles
            ),
            there,
        )
        step(taker, shape)
        # What a graph works in is given to other graphs alone: they write before they read.
        with cupy.cuda.using_allocator(backend.recorded.malloc):
            taker.again()
            step(taker, shape)
            backend.stream.synchronize()
            taker.again()
            backend.stream.begin_capture()
            try:
                self.result: Any = step(taker, shape)
            finally:
                self._graph = backend.stream.end_capture()
        self._table = taker.table

    def check_ids(self, token_ids: NDArray[np.int32]) -> None:
        """Raises IndexError for an id outside the vocabulary."""
        if self._table is not None:
            self._table.check_rows(token_ids)

    def launch(self) -> None:
        """Take the step that `there` was told of, without waiting; `result` is what the step gave once."""
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
        self.linear, self.gated_linear = backend.linear, backend.gated_linear

    def again(self) -> None:
        """Begin the same step anew: what is planned once a step has to be planned again."""
        self.batch = replace(self.batch)

    def embed(self, table: CudaLinear, token_ids: NDArray[np.int32], scale: float) -> Any:
        """As the backend's, of the ids that lie on the device."""
        self.check_ids(table, token_ids)
        return self.backend.embed_there(table, self.ids, scale)

    def check_ids(self, table: CudaLinear, token_ids: NDArray[np.int32]) -> None:
        """Raises IndexError for an id outside the table, which later steps' are looked up in as well."""
        table.check_rows(token_ids)
        self.table = table

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
