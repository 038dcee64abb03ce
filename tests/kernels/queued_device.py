"""In place of CuPy and its device: work in a stream, done on this processor when somebody waits for it.

Copies read and write host memory when they are done, not when they are asked for, as a device does.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.batch import DeviceBatch, Uploads
from kvrelay_kernels.cuda.drawn_steps import CudaDrawing
from kvrelay_kernels.cuda.step_rows import StepRows
from kvrelay_kernels.interface import (
    Activation,
    AttentionSpec,
    BlockCounts,
    HostWeight,
    RopeTable,
    StepBatch,
    WeightMode,
)
from kvrelay_kernels.plans import PlanCounts
from kvrelay_kernels.quant import BlockLayout
from kvrelay_kernels.quant.formats import Element
from kvrelay_kernels.reference.backend import ReferenceArena, ReferenceBackend

Work = Callable[[], None]
REFERENCE: Any = ReferenceBackend()


class Graph:
    """Work that was taken down."""

    def __init__(self) -> None:
        self.work: list[Work] = []

    def launch(self, stream: "Stream") -> None:
        """Do all of it again."""
        for work in self.work:
            stream.do(work)


class Stream:
    """Work that is still to be done, in order."""

    def __init__(self) -> None:
        self._waiting: list[Work] = []
        self._asked = self._done = 0
        self._graph: Graph | None = None

    def do(self, work: Work) -> None:
        """Have it done later, or taken down."""
        if self._graph is not None:
            self._graph.work.append(work)
            return
        self._waiting.append(work)
        self._asked += 1

    def use(self) -> None:
        """It is the only one."""

    def synchronize(self) -> None:
        """Do everything."""
        self.reach(self._asked)

    def reach(self, place: int) -> None:
        """Do what was asked for up to a place."""
        while self._done < place:
            self._waiting.pop(0)()
            self._done += 1

    @property
    def place(self) -> int:
        """Behind everything that was asked for."""
        return self._asked

    def passed(self, place: int) -> bool:
        """Whether all up to a place is done."""
        return self._done >= place

    def begin_capture(self) -> None:
        """Take down what comes."""
        self._graph = Graph()

    def end_capture(self) -> Graph:
        """What came."""
        graph, self._graph = self._graph, None
        assert graph is not None
        return graph


STREAM = Stream()


class Event:
    """A place in the stream."""

    def __init__(self, disable_timing: bool = False) -> None:
        self._place = 0

    def record(self, stream: Stream) -> None:
        self._place = stream.place

    def synchronize(self) -> None:
        STREAM.reach(self._place)

    @property
    def done(self) -> bool:
        return STREAM.passed(self._place)


class DeviceArray(np.ndarray):
    """An array on the device; what is in it is known once the stream has been waited for."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        """Its memory, as CuPy shows it."""
        address = self.ctypes.data

        def to_host(to: int, size: int, stream: Stream) -> None:
            stream.do(lambda: copy(to, address, size))

        def from_host(origin: int, size: int, stream: Stream) -> None:
            stream.do(lambda: copy(address, origin, size))

        return SimpleNamespace(ptr=address, copy_to_host_async=to_host, copy_from_host_async=from_host)

    def get(self) -> NDArray[Any]:
        """A copy on the host."""
        STREAM.synchronize()
        return np.array(self)


def copy(to: int, origin: int, size: int) -> None:
    ctypes.memmove(to, origin, size)


def empty(shape: Any, kind: Any = np.float32) -> DeviceArray:
    """Spoilt memory."""
    array = np.empty(shape, kind)
    array.view(np.uint8).fill(0xFF)
    return array.view(DeviceArray)


def zeros(shape: Any, kind: Any = np.float32) -> DeviceArray:
    """Memory of zeros."""
    return np.zeros(shape, kind).view(DeviceArray)


@contextmanager
def using_allocator(allocate: object) -> Iterator[None]:
    """There is one memory."""
    yield


CUPY = SimpleNamespace(
    empty=empty,
    zeros=zeros,
    cuda=SimpleNamespace(Event=Event, get_current_stream=lambda: STREAM, using_allocator=using_allocator),
)
CUPYX = SimpleNamespace(empty_pinned=np.empty)


class QueuedKernels:
    """Kernels on this processor, each of whose launches waits for its turn."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels

    def load(self, key: Any, shared_bytes: int) -> Callable[..., None]:
        """The kernel of a key."""
        kernel = self._kernels.load(key, shared_bytes)

        def launch(grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...]) -> None:
            given = tuple(np.asarray(arg) if isinstance(arg, DeviceArray) else arg for arg in args)
            STREAM.do(lambda: kernel(grid, block, given))

        return launch


class QueuedArena(ReferenceArena):
    """Blocks that land are there."""

    def settle(self, stream: Stream) -> None:
        """Nothing is on its way."""


class QueuedBackend:
    """The reference's operations, queued; it draws with the CUDA backend's own kernels and steps."""

    name = "queued"
    element: Element = "float32"
    chunk_tokens = 512

    def __init__(self, kernels: Any) -> None:
        self.counts, self.plan_counts = BlockCounts(), PlanCounts()
        self.stream, self.uploads = STREAM, Uploads(3)
        self.recorded = SimpleNamespace(malloc=None)
        self._kernels: Any = QueuedKernels(kernels)

    def load_linear(self, parts: Sequence[HostWeight], mode: WeightMode, bias: Any = None) -> "QueuedMatrix":
        return QueuedMatrix(REFERENCE.load_linear(parts, mode, bias))

    def load_gated(self, gate: HostWeight, up: HostWeight, mode: WeightMode) -> "QueuedMatrix":
        return QueuedMatrix(REFERENCE.load_gated(gate, up, mode))

    def load_array(self, values: NDArray[Any]) -> NDArray[Any]:
        return REFERENCE.load_array(values)

    def new_arena(self, layout: BlockLayout, layers: int, blocks: int) -> QueuedArena:
        return QueuedArena(layout, layers, blocks)

    def new_step_rows(self, rows: int, width: int) -> StepRows:
        return StepRows(rows, width, "sm_90a", self._kernels, self.uploads)

    def new_drawing(self, vocabulary: int, places: int) -> CudaDrawing:
        backend: Any = self
        return CudaDrawing(backend, self._kernels, vocabulary, places)

    def embed_there(self, table: "QueuedMatrix", ids: Any, scale: float, newest: Any = None) -> Any:
        def rows() -> Any:
            known = ids if newest is None else np.where(ids < 0, newest[~np.minimum(ids, -1)], ids)
            return REFERENCE.embed(table.matrix, known, scale)

        return self._queued((len(ids), table.k), rows)

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return self._queued(x.shape, lambda: REFERENCE.rms_norm(x, weight, eps))

    def add_rms_norm(self, x: Any, y: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        total = self._queued(x.shape, lambda: x + y)
        return total, self.rms_norm(total, weight, eps)

    def linear(self, x: Any, weight: "QueuedMatrix", batch: StepBatch | None = None) -> Any:
        return self._queued((len(x), weight.n), lambda: REFERENCE.linear(x, weight.matrix))

    def gated_linear(
        self, x: Any, weight: "QueuedMatrix", activation: Activation, batch: StepBatch | None = None
    ) -> Any:
        shape = len(x), weight.n // 2
        return self._queued(shape, lambda: REFERENCE.gated_linear(x, weight.matrix, activation))

    def append_there(
        self, qkv: Any, batch: DeviceBatch, arena: QueuedArena, layer: int, spec: AttentionSpec,
        rope: RopeTable, norms: Any,
    ) -> Any:  # fmt: skip
        q = empty((len(qkv), spec.heads * spec.head_dim), np.float64)

        def work() -> None:
            rows = np.flatnonzero(batch.slots >= 0)
            q[rows] = REFERENCE.rope_append(qkv[rows], only(batch, rows), arena, layer, spec, rope, norms)

        STREAM.do(work)
        return q

    def attend_there(
        self, q: Any, batch: DeviceBatch, arena: QueuedArena, layer: int, spec: AttentionSpec
    ) -> Any:
        out = empty(q.shape, np.float64)

        def work() -> None:
            rows = np.flatnonzero(batch.lengths)
            out.fill(0)
            out[rows] = REFERENCE.attention(q[rows], only(batch, rows), arena, layer, spec)

        STREAM.do(work)
        return out

    def logits_into(self, x: Any, head: "QueuedMatrix", out: Any) -> None:
        STREAM.do(lambda: np.copyto(out, REFERENCE.linear(x, head.matrix).astype(np.float32)))

    def warm(self, shapes: object) -> None:
        """Nothing to compile."""

    @staticmethod
    def _queued(shape: tuple[int, ...], work: Callable[[], Any]) -> Any:
        out = empty(shape, np.float64)
        STREAM.do(lambda: np.copyto(out, work()))
        return out


class QueuedMatrix:
    """A reference matrix, of which the host knows the shape."""

    def __init__(self, matrix: Any) -> None:
        self.matrix = matrix
        self.n, self.k = matrix[0].shape

    def check_rows(self, rows: NDArray[np.int32]) -> None:
        """As `CudaLinear.check_rows`."""
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.n:
            raise IndexError(f"rows must lie in 0..{self.n - 1}")


def only(batch: DeviceBatch, rows: NDArray[Any]) -> StepBatch:
    """Some rows of a batch, as the device has them now."""
    every = np.arange(len(rows) + 1, dtype=np.int32)
    positions, lengths, tables = (
        np.asarray(array)[rows] for array in (batch.positions, batch.lengths, batch.block_tables)
    )
    return StepBatch(np.zeros(len(rows), np.int32), positions, every, lengths, tables, every[:-1])
