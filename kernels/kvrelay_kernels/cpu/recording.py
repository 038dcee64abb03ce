"""What becomes of a backend's operations: they are done at once, or taken down and repeated."""

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cpu.arena import CpuArena
from kvrelay_kernels.cpu.coded import new_records, rounding
from kvrelay_kernels.cpu.decode import Partials
from kvrelay_kernels.cpu.program import ARGUMENTS, ROUNDED, Operation, Program, address
from kvrelay_kernels.cpu.threads import Threads
from kvrelay_kernels.cpu.weights import aligned
from kvrelay_kernels.interface import StepBatch

Floats = NDArray[np.float32]
Octets = NDArray[np.uint8]

ALONE = 65536
"""Elements below which one thread is done before another has been woken."""


class Sink(Protocol):
    """Where a backend's operations go, and where it takes arrays for their results from."""

    def blank(self, rows: int, width: int) -> Floats:
        """An array for a result."""
        ...

    def numbers(self, count: int) -> NDArray[np.int64]:
        """An array for what operations tell one another."""
        ...

    def before(self, check: Callable[[], None]) -> None:
        """What the host looks at before operations read their inputs."""
        ...

    def do(self, size: int, *operations: Operation, makes: Floats | None = None) -> None:
        """Operations behind each other that touch `size` elements.

        `makes` is what the last one makes, if it can round it at once (`ROUNDED`).
        """
        ...

    def rounded(self, x: Floats) -> Octets:
        """The records (`integers`) of the rows of x, for products of coded weights."""
        ...


class AtOnce:
    """Does operations when they come."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads

    def blank(self, rows: int, width: int) -> Floats:
        """See `Sink`."""
        return np.empty((rows, width), np.float32)

    def numbers(self, count: int) -> NDArray[np.int64]:
        """See `Sink`."""
        return np.empty(count, np.int64)

    def before(self, check: Callable[[], None]) -> None:
        """See `Sink`."""
        check()

    def do(self, size: int, *operations: Operation, makes: Floats | None = None) -> None:
        """See `Sink`."""
        Program(operations, self._threads.claim() if size >= ALONE else 1).run()

    def rounded(self, x: Floats) -> Octets:
        """See `Sink`."""
        out = new_records(*x.shape)
        self.do(x.size, rounding(x, out))
        return out


class Recorder:
    """Takes operations down. An array that the step has let go of holds a later result, as always."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.checks: list[Callable[[], None]] = []
        self._free: dict[int, list[Floats]] = {}
        self._kept: list[NDArray[Any]] = []
        self._makers: dict[int, Operation] = {}
        self._records: dict[tuple[int, int, int], Octets] = {}

    def blank(self, rows: int, width: int) -> Floats:
        """See `Sink`."""
        free = self._free.setdefault(rows * width, [])
        if not free:
            free.append(aligned((rows * width,), np.float32))
            self._kept.append(free[0])
        memory = free.pop()
        self._makers.pop(address(memory), None)
        array = memory.reshape(rows, width)
        weakref.finalize(array, free.append, memory)
        return array

    def numbers(self, count: int) -> NDArray[np.int64]:
        """See `Sink`."""
        self._kept.append(numbers := np.empty(count, np.int64))
        return numbers

    def before(self, check: Callable[[], None]) -> None:
        """See `Sink`."""
        self.checks.append(check)

    def do(self, size: int, *operations: Operation, makes: Floats | None = None) -> None:
        """See `Sink`."""
        self.operations += operations
        if makes is not None:
            self._makers[address(makes)] = operations[-1]

    def rounded(self, x: Floats) -> Octets:
        """See `Sink`. Records lie beside their rows, and are good for as long: rows are made once."""
        place = address(x), *x.shape
        out = self._records.setdefault(place, new_records(*x.shape))
        maker = self._makers.get(address(x))
        if maker is None:
            self.do(x.size, rounding(x, out))
        else:
            maker[ARGUMENTS + ROUNDED] = address(out)
        return out


class Recording:
    """A step of one row a sequence, taken down once; a call puts its rows where the operations look."""

    def __init__(
        self, record: Callable[[Recorder, Partials, StepBatch], Floats], rows: int, arena: CpuArena,
        threads: Threads,
    ) -> None:  # fmt: skip
        zeros, every = np.zeros(rows, np.int32), np.arange(rows + 1, dtype=np.int32)
        tables = np.zeros((rows, arena.blocks), np.int32)
        self._rows = StepBatch(zeros, zeros.copy(), every, np.ones(rows, np.int32), tables, every[:-1])
        self._recorder, self._partials, self._threads = Recorder(), Partials(), threads
        self._read = record, arena
        """What owns the memory that the operations read."""
        self._logits = record(self._recorder, self._partials, self._rows)
        self._program = Program(self._recorder.operations, threads.count)

    @property
    def operations(self) -> list[Operation]:
        """What a call goes through, in order."""
        return self._recorder.operations

    def __call__(self, batch: StepBatch) -> Floats:
        """The step's logits; the next call writes over them."""
        rows = self._rows
        rows.token_ids[:], rows.positions[:], rows.lengths[:] = (
            batch.token_ids,
            batch.positions,
            batch.lengths,
        )
        rows.block_tables[:, : batch.block_tables.shape[1]] = batch.block_tables
        for check in self._recorder.checks:
            check()
        self._partials.grow(batch.lengths)
        self._threads.claim()
        self._program.run()
        return self._logits
