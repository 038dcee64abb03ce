"""The system that a command talks to: a running one, or one that lives as long as the command."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from control_plane.client import Client
from control_plane.commands.view import StartView
from control_plane.config import KvrelayConfig

STOP_SECONDS = 4.5
"""A stop that takes longer is cut off; the kernel ends Ray's processes with this one."""

TERMINATED = 128 + signal.SIGTERM


@contextmanager
def client_of(
    address: str | None, config: KvrelayConfig, verbose: bool, quiet: bool = False
) -> Iterator[Client]:
    """A client of the system at `address`; None: of an embedded one, on a free port, stopped at the end."""
    if address is None:
        free = config.gateway.model_copy(update={"port": 0, "http_port": None})
        with (
            running(config.model_copy(update={"gateway": free}), verbose, quiet) as started,
            client_of(started, config, verbose) as client,
        ):
            yield client
        return
    client = Client(address)
    try:
        client.connect()
        yield client
    finally:
        client.close()


@contextmanager
def running(config: KvrelayConfig, verbose: bool, quiet: bool = False) -> Iterator[str]:
    """The address of a system that runs inside the context, and is stopped within 5 s behind it."""
    from control_plane.system import System

    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    signal.signal(signal.SIGTERM, _terminate)
    with StartView(quiet) as view:
        system = System(config, view.tell, view.progress, verbose)
        try:
            address = system.start()
            view.close()
            yield address
        finally:
            view.close()
            _stop(system.stop)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


def _stop(stop: Callable[[], None]) -> None:
    """Stop undisturbed by further signals, and in bounded time."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in signals]
    cut = threading.Timer(STOP_SECONDS, os._exit, (1,))
    cut.daemon = True
    cut.start()
    try:
        stop()
    finally:
        cut.cancel()
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
