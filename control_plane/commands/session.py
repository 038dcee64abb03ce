"""The system that a command talks to: a running one, or one that lives as long as the command."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from control_plane.client import Client
from control_plane.commands.view import StartView
from control_plane.config import KvrelayConfig
from control_plane.interrupts import Interrupts, held


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
    with held():
        from control_plane.system import System
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=level, format="%(levelname)s %(name)s: %(message)s")
    interrupts = Interrupts()
    with StartView(quiet) as view:

        def tell(who: str, what: str) -> None:
            interrupts.check()
            view.tell(who, what)

        system = System(config, tell, view.progress, verbose)
        try:
            address = system.start()
            interrupts.check()
            view.close()
            yield address
        finally:
            view.close()
            interrupts.bounded_stop(system.stop)
