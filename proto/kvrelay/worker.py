"""What a worker of either pool answers besides its own service: health, status, and drain."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
from grpc_health.v1 import _async as aio  # pyright: ignore[reportAttributeAccessIssue] its stubs lack it
from grpc_health.v1 import health_pb2_grpc

from kvrelay.rpc import statuses
from kvrelay.v1 import worker_pb2, worker_pb2_grpc


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Answers from two functions of the engine."""

    def __init__(
        self, status: Callable[[], worker_pb2.GetWorkerStatusResponse], drain: Callable[[], Awaitable[None]]
    ) -> None:
        self._status = status
        self._drain = drain

    async def GetWorkerStatus(  # noqa: N802
        self, request: worker_pb2.GetWorkerStatusRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> worker_pb2.GetWorkerStatusResponse:
        """Counters and state, as they are now."""
        async with statuses(context):
            return self._status()

    async def Drain(  # noqa: N802
        self, request: worker_pb2.DrainRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> worker_pb2.DrainResponse:
        """Refuse new requests, and answer when the running ones have ended."""
        async with statuses(context):
            await self._drain()
        return worker_pb2.DrainResponse()


def add_worker_services(server: grpc.aio.Server, servicer: WorkerServicer) -> None:
    """Register status, drain and grpc.health.v1 (serving, since a worker listens only when it is ready)."""
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(aio.HealthServicer(), server)
