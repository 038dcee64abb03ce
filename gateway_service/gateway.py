"""The gateway as a whole: its servers, its health, and their start and stop."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gateway_service.config import GatewayConfig
from gateway_service.directory import WorkerDirectory
from gateway_service.http import HttpDoor
from gateway_service.intake import Intake
from gateway_service.metrics import GatewayMetrics
from gateway_service.model import ServedModel
from gateway_service.servicer import SERVICE, InferenceServicer
from kvrelay.errors import BadSetup
from kvrelay.rpc import SERVER_OPTIONS
from kvrelay.v1.worker_pb2 import Pool

HEALTH_SERVICES = ("", SERVICE)


@dataclass(frozen=True)
class ExtraService:
    """A service of another room that is served at the gateway's port, such as ControlService."""

    name: str
    """Full name, as reflection lists it."""
    register: Callable[[grpc.aio.Server], None]


class Gateway:
    """Serves one model from the workers of a directory; all of it lives on one event loop."""

    def __init__(
        self,
        config: GatewayConfig,
        model: ServedModel,
        directory: WorkerDirectory,
        extra_services: Sequence[ExtraService] = (),
    ) -> None:
        self.config = config
        self.metrics = GatewayMetrics()
        self.directory = directory
        self._extra_services = tuple(extra_services)
        self._intake = Intake(config, model, directory, self.metrics)
        self._http = HttpDoor(self._intake, lambda: self.ready)
        self._port = 0
        self._http_port: int | None = None
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._changed = asyncio.Event()
        self._health_task: asyncio.Task[None] | None = None
        directory.subscribe(self._changed.set)

    @property
    def port(self) -> int:
        """Port of the gRPC services, once started."""
        return self._port

    @property
    def http_port(self) -> int | None:
        """Port of the HTTP endpoints, once started; None: there are none."""
        return self._http_port

    @property
    def queued(self) -> int:
        """Requests that wait for a worker."""
        return self._intake.queued

    @property
    def running(self) -> int:
        """Requests taken in that do not wait."""
        return self._intake.running

    @property
    def ready(self) -> bool:
        """Whether both pools have a worker that takes requests."""
        return all(self.directory.ready(pool) for pool in (Pool.POOL_PREFILL, Pool.POOL_DECODE))

    async def start(self) -> None:
        """Serve.

        Raises:
            BadSetup: a port is taken or cannot be bound.
        """
        server = grpc.aio.server(options=SERVER_OPTIONS)
        InferenceServicer(self._intake).register(server)
        for service in self._extra_services:
            service.register(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, *(service.name for service in self._extra_services), health.SERVICE_NAME)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
        try:
            await self._listen(server)
        except BadSetup:
            await server.stop(None)
            raise
        await server.start()
        self._server = server
        self._changed.set()
        self._health_task = asyncio.create_task(self._tell_health())

    async def stop(self, grace: float | None = None) -> None:
        """Stop serving: running requests have `grace` seconds left, by default the configured ones.

        The directory is closed too. Calling it again does nothing.
        """
        server, self._server = self._server, None
        if server is None:
            return
        if self._health_task is not None:
            self._health_task.cancel()
        await self._health.enter_graceful_shutdown()
        await self._intake.stop(self.config.shutdown_seconds if grace is None else grace)
        await self._http.stop()
        await server.stop(1.0)
        await self.directory.close()

    async def _listen(self, server: grpc.aio.Server) -> None:
        address = f"{self.config.host}:{self.config.port}"
        try:
            self._port = server.add_insecure_port(address)
        except RuntimeError:
            raise BadSetup(f"cannot listen on {address}: is another server running there?") from None
        if self.config.http_port is not None:
            self._http_port = await self._http.start(self.config.host, self.config.http_port)

    async def _tell_health(self) -> None:
        """SERVING while both pools have a ready worker."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            status = health_pb2.HealthCheckResponse.SERVING
            if not self.ready:
                status = health_pb2.HealthCheckResponse.NOT_SERVING
            for service in HEALTH_SERVICES:
                await self._health.set(service, status)
