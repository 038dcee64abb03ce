"""Decode steps that end in tokens: recorded, launched without waiting, and read when the device has drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.arena import CudaArena
from kvrelay_kernels.cuda.batch import DeviceBatch
from kvrelay_kernels.cuda.draw import TokenDraws, is_counted, seen_of, settings_of
from kvrelay_kernels.cuda.gemm import CudaLinear
from kvrelay_kernels.cuda.module import KernelCache, device_arch
from kvrelay_kernels.cuda.recording import StandIn, Take, table_width
from kvrelay_kernels.cuda.step_rows import StepRows
from kvrelay_kernels.interface import FROM_DEVICE, NOWHERE, Draw, Logits, Step, StepBatch

if TYPE_CHECKING:
    from kvrelay_kernels.cuda.backend import CudaBackend

TURNS = 4
"""Steps whose tokens lie apart; at most two are under way."""


class CudaDrawing:
    """See `Drawing`. Everything is told on the backend's stream, and so happens there in order."""

    def __init__(self, backend: "CudaBackend", kernels: KernelCache, vocabulary: int, places: int) -> None:
        """Raises MemoryError."""
        import cupy  # pyright: ignore[reportMissingImports]
        import cupyx  # pyright: ignore[reportMissingImports]

        self._backend = backend
        self.rows = filled_rows(places)
        """Rows of the largest step."""
        self.draws = TokenDraws(vocabulary, places, self.rows, device_arch(), kernels, cupy)
        self.logits: Any = cupy.empty((self.rows, vocabulary), np.float32)
        self.tokens: NDArray[np.int32] = cupyx.empty_pinned((TURNS, self.rows), np.int32)
        """On the host, which the device writes to: a step's tokens at its turn."""
        self._drawn = [cupy.cuda.Event(disable_timing=True) for _ in range(TURNS)]
        self._pending: list[PendingTokens | None] = [None] * TURNS
        self._turn = 0

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

    def next_answer(self) -> int:
        """Where in `tokens`, an element, the next step's are to begin."""
        self._turn = (self._turn + 1) % TURNS
        before = self._pending[self._turn]
        if before is not None:
            before.tokens()
        return self._turn * self.rows

    def launched(self, rows: int) -> "PendingTokens":
        """What `next_answer` was asked for is under way, with so many rows."""
        drawn = self._drawn[self._turn]
        drawn.record(self._backend.stream)
        pending = PendingTokens(self.tokens[self._turn, :rows], drawn, self.logits)
        self._pending[self._turn] = pending
        return pending


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
        if (rows, width) not in self._takes:
            there = self._backend.new_step_rows(rows, width)
            self._takes[rows, width] = Take(self._backend, self._step, batch, there, self._stand_in)
        take = self._takes[rows, width]
        take.check_ids(batch.token_ids[(batch.token_ids != FROM_DEVICE) | (places == NOWHERE)])
        take.there.tell(batch, places, self._drawing.next_answer())
        take.launch()
        return self._drawing.launched(batch.rows)

    def shapes(self, blocks: int) -> Sequence[tuple[int, int]]:
        """See `DrawnStep`."""
        rows = sorted({filled_rows(n) for n in range(1, self._drawing.draws.places + 1)})
        widths = sorted({table_width(n) for n in range(1, blocks + 1)})
        return [(n, min(width, blocks)) for n in rows for width in widths]

    def _stand_in(self, batch: DeviceBatch, there: StepRows) -> StandIn:
        return _DrawingStandIn(self._backend, batch, there, self._drawing)


class PendingTokens:
    """See `Pending`."""

    def __init__(self, there: NDArray[np.int32], drawn: Any, logits: Any) -> None:
        """Tokens will be `there`, in memory that later steps write to, when the event `drawn` is done."""
        self._there = there
        self._drawn = drawn
        self._logits = logits
        self._read: NDArray[np.int32] | None = None

    @property
    def done(self) -> bool:
        """See `Pending`."""
        return self._read is not None or bool(self._drawn.done)

    def tokens(self) -> NDArray[np.int32]:
        """See `Pending`."""
        if self._read is None:
            self._drawn.synchronize()
            self._read = self._there.copy()
        return self._read

    def logits(self, rows: Sequence[int]) -> Logits:
        """See `Pending`."""
        self.tokens()
        return np.stack([self._logits[row].get() for row in rows])


def filled_rows(rows: int) -> int:
    """The number of rows that steps of `rows` are filled up to: a few numbers, since each takes a graph.

    Rows that are nobody's cost next to nothing: a product reads its weights for all of them once.
    """
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    unit = 8 if rows <= 64 else 16
    return -(-rows // unit) * unit


class _DrawingStandIn(StandIn):
    """Begins with the tokens drawn before, and ends in new ones."""

    def __init__(
        self, backend: "CudaBackend", batch: DeviceBatch, there: StepRows, drawing: CudaDrawing
    ) -> None:
        super().__init__(backend, batch, there.ids)
        self._there, self._drawing = there, drawing

    def embed(self, table: CudaLinear, token_ids: NDArray[np.int32], scale: float) -> Any:
        """As the backend's, of ids of which the device has drawn some."""
        self.check_ids(table, token_ids)
        return self.backend.embed_there(table, self.ids, scale, self._drawing.draws.newest)

    def logits(self, x: Any, head: CudaLinear, rows: NDArray[np.int32]) -> Any:
        """Draws; gives nothing, for the tokens come to the host in turn."""
        drawing, there = self._drawing, self._there
        logits = drawing.logits[: len(rows)]
        self.backend.logits_into(x, head, logits)
        drawing.draws.draw(logits, there.places, there.lengths, drawing.tokens.ctypes.data, there.answer)
