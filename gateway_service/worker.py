"""A worker as the gateway knows it: where it is, what it last said, and what the gateway holds there."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import grpc.aio

from gateway_service.stream import WorkerError, WorkerLostError, WorkerStream
from kvrelay.errors import NoWorker
from kvrelay.rpc import CHANNEL_OPTIONS
from kvrelay.v1.decode_pb2_grpc import DecodeServiceStub
from kvrelay.v1.prefill_pb2_grpc import PrefillServiceStub
from kvrelay.v1.worker_pb2 import GetWorkerStatusResponse, Pool, WorkerState
from kvrelay.v1.worker_pb2_grpc import WorkerServiceStub

Q = TypeVar("Q")
R = TypeVar("R")

# A restarted worker often has its old address: gRPC's own back-off of up to two minutes would hide it.
OPTIONS: tuple[tuple[str, int], ...] = (
    *CHANNEL_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
)


class Worker:
    """One worker of a pool, with one channel to it."""

    def __init__(self, pool: Pool, worker_id: str, address: str) -> None:
        self.pool = pool
        self.worker_id = worker_id
        self.address = address
        self.in_flight = 0
        """Places taken here and not given back."""
        self.draining = False
        self.answers = False
        """Whether the last status call was answered."""
        self.doubted = False
        """Whether a request has failed here since."""
        self.status = GetWorkerStatusResponse(
            worker_id=worker_id, pool=pool, state=WorkerState.WORKER_STATE_STARTING
        )
        self.streams: set[WorkerStream[Any]] = set()
        self.ask = asyncio.Event()
        """Set to have the status asked for at once."""
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self.decode: Any = DecodeServiceStub(self._channel)
        self.prefill: Any = PrefillServiceStub(self._channel)
        self.service: Any = WorkerServiceStub(self._channel)

    @property
    def ready(self) -> bool:
        """Whether it says that it takes new requests, and may."""
        return self.answers and not self.draining and self.status.state == WorkerState.WORKER_STATE_READY

    @property
    def trusted(self) -> bool:
        """Whether new requests are sent to it."""
        return self.ready and not self.doubted

    @property
    def has_room(self) -> bool:
        """Whether a place is free; a worker that tells no number of slots bounds itself."""
        return not self.status.slots or self.in_flight < self.status.slots

    def open(self, method: Callable[[Q], "grpc.aio.UnaryStreamCall[Q, R]"], request: Q) -> WorkerStream[R]:
        """Call one of its server-streaming methods.

        Raises:
            WorkerLostError: the channel has been given up meanwhile.
        """
        try:
            return WorkerStream(self, method(request))
        except grpc.aio.UsageError as error:
            raise WorkerLostError(self.worker_id, NoWorker("the worker is gone")) from error

    def doubt(self) -> None:
        """Send nothing to it until it answers the next status call."""
        self.doubted = True
        self.ask.set()

    def give_up_streams(self, fault: WorkerError) -> None:
        """End what is open here, so that the requests go on elsewhere."""
        for stream in tuple(self.streams):
            stream.give_up(fault)

    async def close(self) -> None:
        """Give up the channel."""
        await self._channel.close()
