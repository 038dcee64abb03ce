"""A whole system: in this process the gateway and the control service, in others the pools' actors."""

import asyncio
import errno
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

from control_plane.cluster import Cluster
from control_plane.config import KvrelayConfig
from control_plane.loop import LoopThread
from control_plane.plan import decode_plan, gateway_config, prefill_plan
from control_plane.pool import WorkerPool
from control_plane.seat import SeatTimes, Tell
from control_plane.servicer import ControlServicer
from gateway_service.directory import WorkerDirectory
from gateway_service.gateway import ExtraService, Gateway
from gateway_service.model import ServedModel, load_served_model
from kv_transfer.embedded import EmbeddedServer
from kvrelay.errors import BadSetup
from kvrelay.v1.control_pb2 import GetStatusResponse
from kvrelay.v1.control_pb2_grpc import add_ControlServiceServicer_to_server
from kvrelay.v1.worker_pb2 import GetWorkerStatusResponse
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.quant.formats import parse_format
from model_runtime.progress import Progress, silent

CONTROL_SERVICE = "kvrelay.v1.ControlService"

GRACE_SECONDS = 0.5
"""Time that running requests have left once the system is told to stop."""


class System:
    """Started and stopped on the main thread; in between, the gateway answers all calls."""

    def __init__(
        self, config: KvrelayConfig, tell: Tell, progress: Progress = silent, verbose: bool = False
    ) -> None:
        """`tell` hears who does what, `progress` how far a download is."""
        self._config = config
        self._tell = tell
        self._progress = progress
        self._verbose = verbose
        self._stops = ExitStack()

    def start(self) -> str:
        """Bring everything up; returns the address that clients call, once both pools are ready.

        Raises:
            KvrelayError: what stands in the way; whatever was started before it is stopped.
        """
        try:
            return self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End everything that was started; calling it again does nothing."""
        self._stops.close()

    def _start(self) -> str:
        config = self._config
        # What can be found wrong quickly comes first: Ray takes seconds.
        for port in (config.gateway.port, config.gateway.http_port):
            check_port(config.gateway.host, port or 0)
        model = load_served_model(config.model.name, config.model.kv_format, progress=self._progress)
        check_format(model)
        transport = self._open_transport()
        cluster = Cluster(config, self._verbose)
        self._stops.callback(cluster.stop)
        self._tell("ray", "starting" if cluster.embedded else f"joining {config.ray.address}")
        cluster.start()
        self._tell("ray", "ready")
        # Not before Ray: its processes are forked off, and gRPC warns of forks while it serves.
        loop = LoopThread("control-plane")
        self._stops.callback(loop.stop)
        gateway, pools = loop.call(self._open_gateway(model, cluster, transport))
        self._stops.callback(lambda: loop.call(_close(gateway, pools)))
        loop.call(_fill(pools, {"prefill": config.prefill.workers, "decode": config.decode.workers}))
        return f"{config.gateway.host}:{gateway.port}"

    async def _open_gateway(
        self, model: ServedModel, cluster: Cluster, transport: str
    ) -> tuple[Gateway, dict[str, WorkerPool]]:
        """A gateway that answers, and pools without workers."""
        config = self._config
        settings = gateway_config(config)
        directory = WorkerDirectory(settings.poll_seconds, settings.lost_seconds)
        server = transport if transport != "grpc" else None
        store = server if config.transport.share_prefixes else None
        shared = server if config.transport.share_plans else None
        share = cluster.gpu_share
        plans = (
            prefill_plan(config, store, partial(cluster.resources_for, "prefill"), shared, share),
            decode_plan(config, transport, partial(cluster.resources_for, "decode"), shared, share),
        )
        times = SeatTimes(start=config.ray.start_seconds, silent=config.ray.silent_seconds)
        pools = {plan.name: WorkerPool(plan, directory, self._tell, times) for plan in plans}

        def status() -> GetStatusResponse:
            return GetStatusResponse(
                model=model.name,
                kv_format=model.kv_format,
                transport=transport,
                queued=gateway.queued,
                running=gateway.running,
            )

        async def workers() -> list[GetWorkerStatusResponse]:
            await directory.refresh()
            return directory.statuses()

        control = ControlServicer(pools, workers, status)
        extra = ExtraService(CONTROL_SERVICE, partial(add_ControlServiceServicer_to_server, control))
        gateway = Gateway(settings, model, directory, [extra])
        await gateway.start()
        return gateway, pools

    def _open_transport(self) -> str:
        """What the workers are told of the transport; starts a server where the settings ask for one."""
        uri = self._config.transport.uri
        if uri != "redis":
            return uri
        if self._config.ray.address is not None:
            raise BadSetup("on a cluster, --transport needs the URI of a Redis server that all nodes reach")
        self._tell("redis", "starting")
        server = EmbeddedServer()
        self._stops.callback(server.stop)
        self._tell("redis", "ready")
        return server.uri


def check_port(host: str, port: int) -> None:
    """See at once what the gateway would find later.

    Raises:
        BadSetup: something listens at the port already, or the host is none of this machine's addresses.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # As gRPC binds: a port whose last connections still linger is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = "is another server running there?" if taken else error.strerror or str(error)
        raise BadSetup(f"cannot listen on {host}:{port}: {why}") from error


def check_format(model: ServedModel) -> None:
    """See at once what every worker would find later. Raises BadSetup."""
    try:
        parse_format(model.kv_format, model.config.head_dim)
    except FormatUnsupported as error:
        raise BadSetup(str(error)) from error


async def _fill(pools: Mapping[str, WorkerPool], sizes: Mapping[str, int]) -> None:
    await asyncio.gather(*(pools[name].scale(size) for name, size in sizes.items()))


async def _close(gateway: Gateway, pools: Mapping[str, WorkerPool]) -> None:
    await gateway.stop(GRACE_SECONDS)
    await asyncio.gather(*(pool.stop() for pool in pools.values()))
