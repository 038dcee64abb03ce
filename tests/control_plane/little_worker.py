"""A worker without a model: the real shape, a real gRPC server, and switches to fail as workers do."""

import asyncio
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrelay.errors import ModelFileInvalid
from kvrelay.rpc import ServerThread
from kvrelay.v1.worker_pb2 import (
    DrainRequest,
    DrainResponse,
    GetWorkerStatusRequest,
    GetWorkerStatusResponse,
    Pool,
    WorkerState,
)
from kvrelay.v1.worker_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server


@dataclass(frozen=True)
class LittleConfig:
    """What the worker is told, besides a folder of switches: files whose names are orders."""

    worker_id: str
    switches: Path
    host: str = "127.0.0.1"


class LittleServicer(WorkerServiceServicer):
    """Answers for a worker that has requests as long as the file `busy` exists."""

    def __init__(self, config: LittleConfig) -> None:
        self._config = config
        self._state = WorkerState.WORKER_STATE_READY

    async def GetWorkerStatus(self, request: GetWorkerStatusRequest, context: Any) -> GetWorkerStatusResponse:  # noqa: N802
        """Tells the process id as its number of requests, so that tests can kill it."""
        return GetWorkerStatusResponse(
            worker_id=self._config.worker_id,
            pool=Pool.POOL_PREFILL,
            state=self._state,
            requests=os.getpid(),
            activity=os.environ.get("OMP_NUM_THREADS", ""),
        )

    async def Drain(self, request: DrainRequest, context: Any) -> DrainResponse:  # noqa: N802
        """Waits for the last request."""
        self._state = WorkerState.WORKER_STATE_DRAINING
        while (self._config.switches / "busy").exists():
            await asyncio.sleep(0.01)
        return DrainResponse()


class LittleWorker:
    """Starts as slowly, and as badly, as its switches say."""

    def __init__(self, config: LittleConfig) -> None:
        self._config = config
        self._server = ServerThread("little")
        self._activity = "loading weights 50%"
        self._go_on = threading.Event()

    def start(self) -> str:
        """Waits while `slow` exists; dies where `deadly` exists, fails where `broken` does."""
        switches = self._config.switches
        while (switches / "slow").exists():
            self._go_on.wait(0.01)
        if (switches / "deadly").exists():
            os._exit(1)
        if (switches / "broken").exists():
            raise ModelFileInvalid("the file ends in the middle of a tensor")
        servicer = LittleServicer(self._config)
        port = self._server.start(
            lambda server: add_WorkerServiceServicer_to_server(servicer, server), f"{self._config.host}:0"
        )
        self._activity = "serving"
        return f"{self._config.host}:{port}"

    def activity(self) -> str:
        """What it does; nothing, for ever, while `mute` exists."""
        while (self._config.switches / "mute").exists():
            self._go_on.wait(0.05)
        return self._activity

    def stop(self) -> None:
        """Ends the server."""
        self._server.stop(0)
