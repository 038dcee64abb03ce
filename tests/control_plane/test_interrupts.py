"""Ctrl-C and SIGTERM end everything that was started, within 5 s, at whatever moment they come."""

import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from control_plane.interrupts import SIGNALS, Interrupts, held
from tests.control_plane.processes import Marked

STOP_SECONDS = 5.0

linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@pytest.fixture
def served() -> Iterator[Marked]:
    """`kvrelay serve` with every kind of process: Ray, both pools, a Redis server."""
    served = Marked("serve", "--port", "0", "--transport", "redis")
    yield served
    served.end()


@linux
@pytest.mark.parametrize("moment", ["ray: starting", "ray: ready", "packing weights", "is served at"])
def test_ctrl_c_leaves_no_process(served: Marked, moment: str) -> None:
    served.read_until(moment)
    began = time.monotonic()
    os.killpg(served.process.pid, signal.SIGINT)
    code = served.process.wait(2 * STOP_SECONDS)
    assert time.monotonic() - began < STOP_SECONDS
    assert (code, served.alive) == (130, [])


@linux
def test_sigterm_leaves_no_process(served: Marked) -> None:
    served.read_until("ray: ready")
    began = time.monotonic()
    served.process.terminate()
    code = served.process.wait(2 * STOP_SECONDS)
    assert time.monotonic() - began < STOP_SECONDS
    assert (code, served.alive) == (143, [])


@linux
def test_ctrl_c_during_the_imports_is_not_lost() -> None:
    served = Marked("serve", "--port", "0")
    try:
        time.sleep(0.2)
        os.killpg(served.process.pid, signal.SIGINT)
        # Before Python itself is up, the signal's own default ends the process.
        assert served.process.wait(STOP_SECONDS) in (130, -signal.SIGINT, 1)
    finally:
        served.end()


def test_a_held_signal_comes_when_it_is_let_go() -> None:
    reached: list[str] = []

    def work() -> None:
        with held():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end of what holds it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached


def test_a_swallowed_interrupt_is_raised_again_until_the_stop() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    interrupts = Interrupts()
    interrupts.check()
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        interrupts.check()
    assert end.value.code == 143
    # While it stops, nothing disturbs; behind it, all is as it was.
    interrupts.bounded_stop(lambda: signal.raise_signal(signal.SIGINT))
    assert [signal.getsignal(number) for number in SIGNALS] == before
