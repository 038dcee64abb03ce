"""Ctrl-C and SIGTERM as exceptions of the main thread, none of which gets lost."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)

STOP_SECONDS = 4.5
"""A stop that takes longer is cut off; the kernel ends Ray's processes with this one."""


@contextmanager
def held() -> Iterator[None]:
    """Signals wait until the context ends: an exception in an extension's import may be swallowed there."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class Interrupts:
    """Raises KeyboardInterrupt on SIGINT, SystemExit on SIGTERM, from its making until `bounded_stop`."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in self._before.items():
            # A signal that is ignored here was so on purpose, as by nohup.
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._raise)

    def check(self) -> None:
        """On the main thread, raise again what came before and was swallowed by a library's callback."""
        if self._number is not None and threading.current_thread() is threading.main_thread():
            self._raise(self._number, None)

    def bounded_stop(self, stop: Callable[[], None]) -> None:
        """Stop undisturbed by further signals, and in bounded time."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        cut = threading.Timer(STOP_SECONDS, os._exit, (1,))
        cut.daemon = True
        cut.start()
        stop()
        cut.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _raise(self, number: int, frame: FrameType | None) -> NoReturn:
        self._number = number
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)
