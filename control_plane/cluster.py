"""The Ray cluster that workers run on: an embedded one that ends with this process, or one that is joined."""

import logging
import math
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import ray
from ray.exceptions import RayError

from control_plane.config import KvrelayConfig, WorkerSettings, cores
from kvrelay.errors import BadSetup

OBJECT_STORE_BYTES = 96 * 1024 * 1024
"""Blocks travel over kvrelay's own channels: the store holds only what Ray itself puts there."""

SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107
"""Longest path that a Unix socket may have."""

SESSION_PATH_BYTES = 72
"""Length of `/ray/session_<date>_<time>_<pid>/sockets/plasma_store`."""

CONNECT_SECONDS = 5.0

log = logging.getLogger(__name__)


class Cluster:
    """A connection of this process to Ray; there is one in a process."""

    def __init__(self, config: KvrelayConfig, verbose: bool = False) -> None:
        self._config = config
        self._verbose = verbose
        self.folder: Path | None = None
        """What an embedded cluster keeps its logs and sockets in; removed at its end."""

    @property
    def embedded(self) -> bool:
        """Whether the cluster is this process's own."""
        return self._config.ray.address is None

    def start(self) -> None:
        """Start or join the cluster, on the main thread: Ray's processes die with the thread that made them.

        Raises:
            BadSetup: the cluster cannot be reached, or its processes did not start.
        """
        address = self._config.ray.address
        on_terminate = signal.getsignal(signal.SIGTERM)
        try:
            if address is None:
                self._embed()
            else:
                _check_reachable(address)
                ray.init(address=address, log_to_driver=self._verbose, logging_level=self._level)
        except (RuntimeError, ValueError, OSError, RayError) as error:
            self.stop()
            where = "an embedded Ray cluster" if address is None else f"the Ray cluster at {address}"
            raise BadSetup(f"{where} is not usable: {_first_line(error)}") from error
        except SystemExit as end:
            # Of Ray's own handler, which would make it the exit code of a program that ends with 15.
            raise SystemExit(128 + signal.SIGTERM if end.code == signal.SIGTERM else end.code) from None
        finally:
            # Ray puts a handler of its own in its place.
            signal.signal(signal.SIGTERM, on_terminate)

    def resources_for(self, pool: str) -> Mapping[str, float]:
        """One unit of the pool's own logical resource, where the cluster has such."""
        return {pool: 1.0} if ray.cluster_resources().get(pool) else {}

    @property
    def gpu_share(self) -> float:
        """Of a GPU, for each worker whose settings name no share of their own."""
        gpus = ray.cluster_resources().get("GPU", 0) if self._wants_gpus else 0
        return even_share(gpus, sum(pool.workers for pool in self._pools))

    def stop(self) -> None:
        """Leave the cluster, or end it where it is this process's own; calling it again does nothing."""
        ray.shutdown()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    @property
    def _pools(self) -> tuple[WorkerSettings, ...]:
        return self._config.prefill, self._config.decode

    @property
    def _wants_gpus(self) -> bool:
        """Whether workers will compute on GPUs, or are told to hold some."""
        backend = self._config.model.backend
        usable = backend == "cuda" or (backend == "auto" and find_spec("cupy") is not None)
        return usable or any(pool.gpus for pool in self._pools)

    @property
    def _level(self) -> int:
        return logging.INFO if self._verbose else logging.ERROR

    def _embed(self) -> None:
        num_cpus = self._config.ray.num_cpus
        if num_cpus is None:
            num_cpus = cores() if any(pool.cpus for pool in self._pools) else 0
        self.folder = Path(tempfile.mkdtemp(prefix="kvrelay-ray-", dir=short_folder(tempfile.gettempdir())))
        # Ray takes these from the environment of the process that starts it, and nowhere else.
        os.environ.update(
            {
                # Ray would write a token into the home folder, which a container may lack or hold read-only.
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
                "RAY_USAGE_STATS_ENABLED": "0",
                # Ray would start a process for each core, which no actor with its own environment can use.
                "RAY_prestart_worker_first_driver": "0",
                # Earlier versions would hide all GPUs from workers that reserve none.
                "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            }
        )
        ray.init(
            address="local",
            num_cpus=num_cpus,
            num_gpus=None if self._wants_gpus else 0,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=self._verbose,
            logging_level=self._level,
            # One further down: Ray opens its folder to everyone, and mkdtemp's is for its owner only.
            _temp_dir=str(self.folder / "ray"),
        )


def even_share(gpus: float, workers: int) -> float:
    """Of a GPU, for each of `workers`; 0 where there is but one: memory alone says how many fit on it.

    Ray fills one GPU before it takes the next, so that only large shares spread workers over all of them.
    """
    return 1 / max(1, math.ceil(workers / gpus)) if gpus > 1 else 0.0


def short_folder(folder: str) -> str:
    """The folder, unless Ray's sockets inside it would have too long a path."""
    room = SOCKET_PATH_BYTES - SESSION_PATH_BYTES - len("/kvrelay-ray-12345678")
    return folder if len(os.fsencode(folder)) <= room else "/tmp"


def _check_reachable(address: str) -> None:
    """See at once what Ray would try for minutes. Raises OSError."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
