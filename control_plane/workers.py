"""A worker as a Ray actor: the process around `PrefillWorker` and `DecodeWorker`."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

import ray

from control_plane.backend import choose
from decode_service.config import DecodeConfig
from prefill_service.config import PrefillConfig

Config = TypeVar("Config", PrefillConfig, DecodeConfig)


class Worker(Protocol):
    """What both pools' workers are to the control plane; all else goes over gRPC."""

    def start(self) -> str:
        """Load, warm and serve; returns `host:port`."""
        ...

    def activity(self) -> str:
        """What it does while it starts; callable while `start` runs."""
        ...

    def stop(self) -> None:
        """End at once."""
        ...


class WorkerActor(Generic[Config]):
    """Runs in a process of its own, with threads enough to answer while `start` and `ended` block."""

    def __init__(self, make: Callable[[Config], Worker], config: Config) -> None:
        self._make = make
        self._config = config
        self._worker: Worker | None = None
        self._ended = threading.Event()

    def start(self, host: str | None) -> str:
        """Start the worker; None: at the address under which other nodes reach this one."""
        config = replace(self._config, host=host or ray.util.get_node_ip_address())
        self._worker = self._make(config)
        return self._worker.start()

    def activity(self) -> str:
        """What the worker does; answers also serve as signs of life."""
        return "loading libraries" if self._worker is None else self._worker.activity()

    def ended(self) -> None:
        """Returns once the worker was told to stop; fails when its process dies."""
        self._ended.wait()

    def stop(self) -> None:
        """End the worker; the process lives on until it is killed."""
        if self._worker is not None:
            self._worker.stop()
        self._ended.set()


def _choose_backend(config: Config) -> Config:
    """With a backend of the machine that this is, where none was named."""
    decoder = config.decoder
    return replace(config, decoder=replace(decoder, backend=choose(decoder.backend)))


def prefill_worker(config: PrefillConfig) -> Worker:
    """A prefill worker; imported here, since only the actor's process needs its compilers and libraries."""
    from prefill_service.worker import PrefillWorker

    return PrefillWorker(_choose_backend(config))


def decode_worker(config: DecodeConfig) -> Worker:
    """A decode worker; imported here, since only the actor's process needs its compilers and libraries."""
    from decode_service.worker import DecodeWorker

    return DecodeWorker(_choose_backend(config))
