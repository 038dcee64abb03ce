"""A whole system in one process: the gateway, the control service, and the pools of actors that they steer."""

import asyncio
import errno
import logging
import socket
from contextlib import ExitStack

from gateway_service.directory import WorkerDirectory
from gateway_service.gateway import ExtraService, Gateway
from gateway_service.model import ServedModel
from kv_transfer.embedded import EmbeddedRedis
from kvrelay.errors import BadSetup
from kvrelay.v1.control_pb2 import GetStatusResponse
from kvrelay.v1.control_pb2_grpc import add_ControlServiceServicer_to_server
from model_runtime.catalog import default_cache_dir, resolve
from model_runtime.chat_template import ChatTemplate
from model_runtime.checkpoint import ResolvedModel, load_model
from model_runtime.progress import Progress, silent
from model_runtime.tokenizer import load_tokenizer

from control_plane.cluster import Cluster
from control_plane.config import KvrelayConfig
from control_plane.loop import LoopThread
from control_plane.plan import decode_plan, gateway_config, prefill_plan
from control_plane.pool import WorkerPool
from control_plane.seat import SeatTimes, Tell
from control_plane.servicer import ControlServicer

log = logging.getLogger(__name__)

CONTROL_SERVICE = "kvrelay.v1.ControlService"

GRACE_SECONDS = 0.5
"""Time that running requests have left once the system is told to stop."""


class System:
    """Started and stopped on the main thread; in between it runs by itself, and its gateway answers all calls."""

    def __init__(self, config: KvrelayConfig, tell: Tell, progress: Progress = silent, verbose: bool = False) -> None:
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
        check_port(config.gateway.host, config.gateway.port)
        cache = default_cache_dir()
        model = resolve(config.model.name, cache, self._progress)
        transport = self._open_transport()
        loop = LoopThread("control-plane")
        self._stops.callback(loop.stop)
        cluster = Cluster(config, self._verbose)
        self._stops.callback(cluster.stop)
        plane = loop.submit(self._open(model, cluster, transport))
        self._tell("ray", "starting" if cluster.embedded else f"joining {config.ray.address}")
        cluster.start()
        self._tell("ray", "ready")
        gateway, pools = plane.result()
        self._stops.callback(lambda: loop.call(_close(gateway, pools)))
        sizes = (config.prefill.workers, config.decode.workers)
        loop.call(_scale(pools, sizes))
        return f"{config.gateway.host}:{gateway.port}"
'''
