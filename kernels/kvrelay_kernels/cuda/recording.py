"""A decode step taken down once as a CUDA graph, and launched again and again."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.arena import CudaArena
from kvrelay_kernels.cuda.batch import ALIGNMENT, DeviceBatch, Singles, slots_of
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
        self._takes: dict[int, _Take] = {}

    def __call__(self, batch: StepBatch) -> Logits:
        """The logits of a step, `[rows, vocabulary]`; overwritten by the next call."""
        self._backend.stream.use()
        self._arena.settle(self._backend.stream)
        width = max(NARROWEST, 1 << (batch.block_tables.shape[1] - 1).bit_length())
        if width not in self._takes:
            self._takes[width] = _Take(self._backend, self._step, batch, width)
        return self._takes[width].run(batch)


class _Take:
    """One graph and the arrays that change between its launches."""

    def __init__(self, backend: "CudaBackend", step: Step, batch: StepBatch, width: int) -> None:
        import cupy  # pyright: ignore[reportMissingImports]

        self._backend = backend
        self._tables = np.zeros((batch.sequences, width), np.int32)
        self._starts = np.arange(batch.sequences + 1, dtype=np.int32)
        items = sum(-(-array.size // ALIGNMENT) * ALIGNMENT for array in self._arrays(batch))
        self._memory = cupy.empty(items, np.int32)
        ids, positions, slots, starts, lengths, tables = self._send(batch)
        there = DeviceBatch(
            batch, positions, slots, starts, lengths, tables, Singles(None, lengths, tables, batch.sequences)
        )
        stand_in = _StandIn(backend, there, ids)
        step(stand_in, batch)
        # What a graph works in is given to other graphs alone: they write before they read.
        with cupy.cuda.using_allocator(backend.recorded.malloc):
            stand_in.again()
            step(stand_in, batch)
            backend.stream.synchronize()
            stand_in.again()
            backend.stream.begin_capture()
            try:
                self._logits = step(stand_in, batch)
            finally:
                self._graph = backend.stream.end_capture()
        self._table = stand_in.table

    def run(self, batch: StepBatch) -> Logits:
        """Upload a batch, launch, and wait."""
        if self._table is not None:
            self._table.check_rows(batch.token_ids)
        self._send(batch)
        self._graph.launch(self._backend.stream)
        self._backend.stream.synchronize()
        return self._logits

    def _send(self, batch: StepBatch) -> Sequence[Any]:
        return self._backend.uploads.send(self._arrays(batch), self._memory)

    def _arrays(self, batch: StepBatch) -> list[NDArray[np.int32]]:
        self._tables[:, : batch.block_tables.shape[1]] = batch.block_tables
        return [batch.token_ids, batch.positions, slots_of(batch), self._starts, batch.lengths, self._tables]


class _StandIn:
    """The backend, for a batch that lies on the device already and changes there between launches."""

    def __init__(self, backend: "CudaBackend", batch: DeviceBatch, ids: Any) -> None:
        self._backend = backend
        self._batch = batch
        self._ids = ids
        self._host: Logits | None = None
        self.table: CudaLinear | None = None
        self.rms_norm, self.add_rms_norm = backend.rms_norm, backend.add_rms_norm
        self.linear, self.gate = backend.linear, backend.gate

    def again(self) -> None:
        """Begin the same step anew: what is planned once a step has to be planned again."""
        self._batch = replace(self._batch)

    def embed(self, table: CudaLinear, token_ids: NDArray[np.int32], scale: float) -> Any:
        """As the backend's, of the ids that lie on the device."""
        table.check_rows(token_ids)
        self.table = table
        return self._backend.embed_there(table, self._ids, scale)

    def rope_append(
        self, qkv: Any, batch: StepBatch, arena: CudaArena, layer: int, spec: AttentionSpec, rope: RopeTable,
        norms: tuple[Any, Any, float] | None,
    ) -> Any:  # fmt: skip
        """As the backend's."""
        return self._backend.append_there(qkv, self._batch, arena, layer, spec, rope, norms)

    def attention(self, q: Any, batch: StepBatch, arena: CudaArena, layer: int, spec: AttentionSpec) -> Any:
        """As the backend's."""
        return self._backend.attend_there(q, self._batch, arena, layer, spec)

    def logits(self, x: Any, head: CudaLinear, rows: NDArray[np.int32]) -> Logits:
        """As the backend's, of all rows, but without waiting."""
        import cupyx  # pyright: ignore[reportMissingImports]

        host = self._host
        if host is None:
            host = self._host = cupyx.empty_pinned((len(rows), head.n), np.float32)
        return self._backend.logits_there(x, head, host)
