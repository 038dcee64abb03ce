"""Decode steps that end in tokens: recorded, launched without waiting, and read when the device has drawn."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.arena import CudaArena
from kvrelay_kernels.cuda.batch import DeviceBatch
from kvrelay_kernels.cuda.draw import TokenDraws, is_counted, seen_of, settings_of
from kvrelay_kernels.cuda.gemm import CudaLinear
from kvrelay_kernels.cuda.module import KernelCache, device_arch
from kvrelay_kernels.cuda.recording import StandIn, Take, filled, step_arrays, table_width
from kvrelay_kernels.interface import FROM_DEVICE, NOWHERE, Draw, Logits, Step, StepBatch

if TYPE_CHECKING:
    from kvrelay_kernels.cuda.backend import CudaBackend


class CudaDrawing:
    """See `Drawing`. Everything is told on the backend's stream, and so happens there in order."""

    def __init__(self, backend: "CudaBackend", kernels: KernelCache, vocabulary: int, places: int) -> None:
        """Raises MemoryError."""
        import cupy  # pyright: ignore[reportMissingImports]

        self._backend = backend
        self.rows = filled_rows(places)
        """Rows of the largest step."""
        self.draws = TokenDraws(vocabulary, places, self.rows, device_arch(), kernels, cupy)
        self.ids: Any = cupy.empty(self.rows, np.int32)
        self.logits: Any = cupy.empty((self.rows, vocabulary), np.float32)
        self.tokens: Any = cupy.empty(self.rows, np.int32)

    def join(self, place: int, draw: Draw, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> None:
        """See `Drawing`."""
        self._backend.stream.use()
        draws, counted = self.draws, is_counted(draw, len(prompt_ids))
        self._backend.uploads.send([settings_of(draw, counted).view(np.int32)], draws.settings[place])
        if counted:
            seen = seen_of(draw, prompt_ids, answer_ids, draws.vocabulary)
            self._backend.uploads.send([seen.view(np.int32)], draws.seen[place].view(np.int32))

    def record(self, step: Step, arena: CudaArena) -> "DrawnRecording":
        """See `Drawing`."""
        return DrawnRecording(self._backend, self, step, arena)


class DrawnRecording:
    """See `DrawnStep`. One graph for each number of rows and width of tables that steps are filled up to."""

    def __init__(self, backend: "CudaBackend", drawing: CudaDrawing, step: Step, arena: CudaArena) -> None:
        self._backend = backend
        self._drawing = drawing
        self._step = step
        self._arena = arena
        self._takes: dict[tuple[int, int], Take] = {}

    def __call__(self, batch: StepBatch, places: NDArray[np.int32]) -> "PendingTokens":
        """See `DrawnStep`. Raises IndexError for a token outside the vocabulary."""
        self._backend.stream.use()
        self._arena.settle(self._backend.stream)
        rows, width = filled_rows(batch.rows), table_width(batch.block_tables.shape[1])
        newest = (batch.token_ids == FROM_DEVICE) & (places != NOWHERE)
        told = np.where(newest, 0, batch.token_ids)
        arrays = step_arrays(replace(batch, token_ids=np.where(newest, ~places, told)), width, rows)
        if (rows, width) not in self._takes:
            # What is run before the launch draws for nobody: it would count tokens that are never answered.
            nowhere = np.full(rows, NOWHERE, np.int32)
            shape = shape_of(filled(told, rows), width)
            take = Take(self._backend, self._step, shape, [*arrays, nowhere], self._stand_in)
            self._takes[rows, width] = take
        take = self._takes[rows, width]
        take.check_ids(told)
        take.launch([*arrays, filled(places, rows, NOWHERE)])
        return PendingTokens(self._drawing, batch.rows, self._backend.stream)

    def shapes(self, blocks: int) -> Sequence[tuple[int, int]]:
        """See `DrawnStep`."""
        rows = sorted({filled_rows(n) for n in range(1, self._drawing.draws.places + 1)})
        widths = sorted({table_width(n) for n in range(1, blocks + 1)})
        return [(n, min(width, blocks)) for n in rows for width in widths]

    def _stand_in(self, batch: DeviceBatch, ids: Any, places: Any) -> StandIn:
        return _DrawingStandIn(self._backend, batch, ids, places, self._drawing)


class PendingTokens:
    """See `Pending`."""

    def __init__(self, drawing: CudaDrawing, rows: int, stream: Any) -> None:
        """Has the tokens that `stream` will have drawn copied to the host."""
        import cupy  # pyright: ignore[reportMissingImports]
        import cupyx  # pyright: ignore[reportMissingImports]

        self._drawing = drawing
        # Its own, since the next step may be over before this one's tokens are read.
        self._tokens: NDArray[np.int32] = cupyx.empty_pinned((rows,), np.int32)
        drawing.tokens.data.copy_to_host_async(self._tokens.ctypes.data, self._tokens.nbytes, stream)
        self._copied = cupy.cuda.Event(disable_timing=True)
        self._copied.record(stream)

    @property
    def done(self) -> bool:
        """See `Pending`."""
        return bool(self._copied.done)

    def tokens(self) -> NDArray[np.int32]:
        """See `Pending`."""
        self._copied.synchronize()
        return self._tokens

    def logits(self, rows: Sequence[int]) -> Logits:
        """See `Pending`."""
        self._copied.synchronize()
        return np.stack([self._drawing.logits[row].get() for row in rows])


def filled_rows(rows: int) -> int:
    """The number of rows that steps of `rows` are filled up to: a few numbers, since each takes a graph.

    Rows that are nobody's cost next to nothing: a product reads its weights for all of them once.
    """
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    unit = 8 if rows <= 64 else 16
    return -(-rows // unit) * unit


def shape_of(token_ids: NDArray[np.int32], width: int) -> StepBatch:
    """What the host is told of a step that is taken down; beyond the ids, nothing but its shape is read."""
    rows = len(token_ids)
    zeros, every = np.zeros(rows, np.int32), np.arange(rows + 1, dtype=np.int32)
    return StepBatch(token_ids, zeros, every, zeros, np.zeros((rows, width), np.int32), every[:-1])


class _DrawingStandIn(StandIn):
    """Begins with the tokens drawn before, and ends in new ones."""

    def __init__(
        self, backend: "CudaBackend", batch: DeviceBatch, ids: Any, places: Any, drawing: CudaDrawing
    ) -> None:
        super().__init__(backend, batch, drawing.ids[: len(ids)])
        self._given, self._places, self._drawing = ids, places, drawing

    def embed(self, table: CudaLinear, token_ids: NDArray[np.int32], scale: float) -> Any:
        """As the backend's, of ids of which the device has drawn some."""
        self._drawing.draws.newest_ids(self._given, self.ids)
        return super().embed(table, token_ids, scale)

    def logits(self, x: Any, head: CudaLinear, rows: NDArray[np.int32]) -> Any:
        """Draws; gives the tokens, on the device."""
        drawing = self._drawing
        logits, tokens = drawing.logits[: len(rows)], drawing.tokens[: len(rows)]
        self.backend.logits_into(x, head, logits)
        drawing.draws.draw(logits, self._places, self.batch.lengths, tokens)
        return tokens
