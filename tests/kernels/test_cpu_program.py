"""Programs: every task once, each operation behind the one before, whoever does the work."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay_kernels.cpu.program import Program, address, longs, operation, task_code
from kvrelay_kernels.cpu.recording import Recorder
from kvrelay_kernels.cpu.threads import Threads


def _sum_up(at: int, task: int) -> None:
    """out[task] = 1 + the sum of what came before; what, how many, out, how often."""
    a = longs(at)
    before, count, out, visits = longs(a[0]), a[1], longs(a[2]), longs(a[3])
    total = 1
    for i in range(count):
        total += before[i]
    out[task] = total
    visits[task] += 1


def _count(at: int, _: int) -> None:
    """Tells a later operation how many tasks it has."""
    a = longs(at)
    longs(a[0])[0] = a[1]


SUM_UP: Any = task_code(_sum_up)
COUNT: Any = task_code(_count)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=40), st.integers(1, 5))
def test_operations_see_all_of_the_one_before(sizes: list[tuple[int, bool]], threads: int) -> None:
    Threads(threads).claim()
    arrays = [np.zeros(max(1, size), np.int64) for size, _ in sizes]
    visits = [np.zeros(max(1, size), np.int64) for size, _ in sizes]
    told = np.full(len(sizes), -1, np.int64)
    operations, before, length = [], np.zeros(1, np.int64), 0
    for index, (size, later) in enumerate(sizes):
        places = address(before), length, address(arrays[index]), address(visits[index])
        if later:
            operations.append(operation(COUNT, 1, address(told[index:]), size))
        operations.append(operation(SUM_UP, told[index:] if later else size, *places))
        before, length = arrays[index], size
    program = Program(operations, threads)
    for run in (1, 2, 3):
        told[:] = -1
        for array in arrays:
            array[:] = -(10**6)
        program.run()
        wanted, length = 0, 0
        for (size, _), array, visited in zip(sizes, arrays, visits, strict=True):
            wanted, length = 1 + wanted * length, size
            assert (array[:size] == wanted % 2**64 - (2**64 if wanted % 2**64 >= 2**63 else 0)).all()
            assert (visited[:size] == run).all()


def test_an_array_that_is_let_go_is_used_again() -> None:
    recorder = Recorder()
    first, second = recorder.blank(2, 8), recorder.blank(2, 8)
    assert not np.shares_memory(first, second)
    where = address(first)
    del first
    third, fourth = recorder.blank(4, 4), recorder.blank(2, 8)
    assert address(third) == where
    assert len({address(array) for array in (second, third, fourth)}) == 3


@pytest.mark.parametrize("wanted", [1, 2, 1000])
def test_threads_are_no_more_than_there_are(wanted: int) -> None:
    assert 1 <= Threads(wanted).count <= max(1, wanted)
