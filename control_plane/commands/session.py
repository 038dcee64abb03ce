"""The system that a command talks to: a running one, or one that lives as long as the command."""

import logging
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

from control_plane.client import Client
from control_plane.commands.flags import Target
from control_plane.commands.view import StartView
from control_plane.config import KvrelayConfig
from control_plane.interrupts import Interrupts, held


@contextmanager
def client_of(target: Target, quiet: bool = False) -> Iterator[Client]:
    """A client of the target; one that does not run yet listens on a free port, and is stopped at the end."""
    if target.address is not None:
        with closing(Client(target.address)) as client:
            client.connect()
            yield client
        return
    free = target.config.gateway.model_copy(update={"port": 0, "http_port": None})
    config = target.config.model_copy(update={"gateway": free})
    with running(config, target.verbose, quiet) as address, closing(Client(address)) as client:
        yield client


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
