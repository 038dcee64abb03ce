"""Lists of operations that all threads go through together, with no interpreter between them.

An operation is cut into tasks. Each thread has a stretch of them, which it claims one by one, so that its
reads go on where they were; then it helps the others. All go on to the next operation when the tasks of this
one are done. So a thread that lost its core holds nobody up except with the task in its hands.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, prange, types
from numba.core import cgutils
from numba.np.numpy_support import carray
from numpy.typing import NDArray

from kvrelay_kernels.cpu.vector import INT, emitted

Operation = NDArray[np.int64]
"""`[FIELDS]`: address of a task's code, of the number of tasks (0: the next field), it, arguments."""

FIELDS = 28
ARGUMENTS = 3
ROUNDED = FIELDS - ARGUMENTS - 1
"""The argument of some operations on rows that says where to put their results rounded, too; or 0."""
LINE = 8
"""int64 of a cache line: what threads count in lies in lines of its own."""
PATIENCE = 65536
"""Looks at a counter, about a hundred microseconds, before a waiting thread lets others have its core. They
keep it for milliseconds: what they ask for in between two tasks, the system's own preemption gives them."""
THREADED: Any = {"prange": True, "setitem": False, "numpy": False, "reduction": False, "comprehension": False}
"""What `parallel` means here: explicit loops. Numba would wake its threads for each array filled, too."""


def task_code(body: Callable[[Any, Any], None]) -> Any:
    """`body(arguments' address, task)`, which raises nothing, compiled to be called by address."""
    return cfunc(types.void(types.intp, types.intp), cache=True, error_model="numpy")(body)


def address(array: NDArray[Any]) -> int:
    """Where an array's memory begins."""
    return array.__array_interface__["data"][0]


def real(value: float) -> int:
    """A float64 as an argument: its bits."""
    return int(np.float64(value).view(np.int64))


def operation(code: Any, tasks: int | NDArray[np.int64], *arguments: int) -> Operation:
    """`tasks` tasks of `code`; where their number is an array, it is read from there when its turn comes."""
    row = np.zeros(FIELDS, np.int64)
    if isinstance(tasks, int):
        row[2] = tasks
    else:
        row[1] = address(tasks)
    row[0] = code.address
    row[ARGUMENTS : ARGUMENTS + len(arguments)] = arguments
    return row


@emitted
def _pointer(typing: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


@njit(nogil=True, inline="always")
def floats(at: int) -> Any:
    """The memory from an address on, as float32."""
    return carray(_pointer(at), (1,), np.float32)


@njit(nogil=True, inline="always")
def octets(at: int) -> Any:
    """The memory from an address on, as bytes."""
    return carray(_pointer(at), (1,), np.uint8)


@njit(nogil=True, inline="always")
def halves(at: int) -> Any:
    """The memory from an address on, as the bits of float16."""
    return carray(_pointer(at), (1,), np.uint16)


@njit(nogil=True, inline="always")
def words(at: int) -> Any:
    """The memory from an address on, as int32."""
    return carray(_pointer(at), (1,), np.int32)


@njit(nogil=True, inline="always")
def flags(at: int) -> Any:
    """The memory from an address on, as booleans."""
    return carray(_pointer(at), (1,), np.bool_)


@njit(nogil=True, inline="always")
def longs(at: int) -> Any:
    """The memory from an address on, as int64."""
    return carray(_pointer(at), (1,), np.int64)


@njit(nogil=True, inline="always")
def doubles(at: int) -> Any:
    """The memory from an address on, as float64."""
    return carray(_pointer(at), (1,), np.float64)


def _place(builder: Any, at: Any) -> Any:
    return builder.inttoptr(at, at.type.as_pointer())


@emitted
def _add(typing: Any, at: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _place(builder, args[0]), args[1], "acq_rel")

    return types.intp(types.intp, types.intp), generate


@emitted
def _look(typing: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_place(builder, args[0]), "acquire", 8)

    return types.intp(types.intp), generate


@emitted
def _perform(typing: Any, code: Any, arguments: Any, task: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code_, arguments_, task_ = args
        kind = ir.FunctionType(ir.VoidType(), [arguments_.type, task_.type])
        builder.call(builder.inttoptr(code_, kind.as_pointer()), [arguments_, task_])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@emitted
def _give_way(typing: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(INT, []), "sched_yield")
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate


@njit(parallel=THREADED, nogil=True, cache=True)
def _run(operations: int, count: int, counters: int, threads: int) -> None:
    # Addresses, not arrays: Numba would copy the descriptions of arrays for each thread.
    cleared, lines = longs(counters), threads + 1
    for line in range(count * lines):
        cleared[line * LINE] = 0
    for thread in prange(threads):
        for index in range(count):
            row = operations + index * FIELDS * 8
            fields = longs(row)
            tasks = fields[2] if fields[1] == 0 else longs(fields[1])[0]
            finished = counters + index * lines * LINE * 8
            done = 0
            for turn in range(threads):
                owner = (thread + turn) % threads
                first, last = owner * tasks // threads, (owner + 1) * tasks // threads
                while first < last:
                    task = first + _add(finished + (owner + 1) * LINE * 8, 1)
                    if task >= last:
                        break
                    _perform(fields[0], row + ARGUMENTS * 8, task)
                    done += 1
            if done > 0:
                _add(finished, done)
            looks = 0
            while _look(finished) < tasks:
                looks += 1
                if looks > PATIENCE:
                    _give_way()


class Program:
    """Operations in their order, for so many threads; what they point to must be kept alive."""

    def __init__(self, operations: Sequence[Operation], threads: int) -> None:
        self._operations = np.stack(operations)
        self._threads = threads
        raw = np.zeros((len(operations) * (threads + 1) + 1) * LINE, np.int64)
        self._counters = raw[-(address(raw) // 8) % LINE :]

    def run(self) -> None:
        """Go through all operations once; one thread at a time may call."""
        operations = self._operations
        _run(address(operations), len(operations), address(self._counters), self._threads)
