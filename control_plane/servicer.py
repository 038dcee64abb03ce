"""ControlService: what runs, and how many workers a pool has."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from control_plane.pool import WorkerPool
from kvrelay.errors import InvalidArgument
from kvrelay.rpc import statuses
from kvrelay.v1.control_pb2 import GetStatusRequest, GetStatusResponse, ScaleRequest, ScaleResponse
from kvrelay.v1.control_pb2_grpc import ControlServiceServicer
from kvrelay.v1.worker_pb2 import GetWorkerStatusResponse

MAX_WORKERS = 1024
"""A pool asked for more is taken for a typing mistake."""


class ControlServicer(ControlServiceServicer):
    """Lives on the loop of the gateway and the pools."""

    def __init__(
        self,
        pools: Mapping[str, WorkerPool],
        workers: Callable[[], Awaitable[list[GetWorkerStatusResponse]]],
        system: Callable[[], GetStatusResponse],
    ) -> None:
        """`workers` tells how those in the directory do; `system` all that is not about workers."""
        self._pools = pools
        self._workers = workers
        self._system = system

    async def GetStatus(self, request: GetStatusRequest, context: Any) -> GetStatusResponse:
        """Workers as they say they are now, and those that start."""
        status = self._system()
        workers = await self._workers()
        for pool in self._pools.values():
            workers.extend(pool.starting)
        # By length first, so that prefill-10 comes behind prefill-9.
        workers.sort(key=lambda worker: (worker.pool, len(worker.worker_id), worker.worker_id))
        status.workers.extend(workers)
        return status

    async def Scale(self, request: ScaleRequest, context: Any) -> ScaleResponse:
        """Goes on to its end also where the caller does not wait for it."""
        async with statuses(context):
            wanted = {"prefill": request.prefill, "decode": request.decode}
            sizes = {field.name: wanted[field.name] for field, _ in request.ListFields()}
            for name, size in sizes.items():
                if not 1 <= size <= MAX_WORKERS:
                    raise InvalidArgument(f"{name}: a pool has 1 to {MAX_WORKERS} workers, not {size}")
            scaling = asyncio.gather(*(self._pools[name].scale(size) for name, size in sizes.items()))
            await asyncio.shield(scaling)
        return ScaleResponse(**{name: pool.size for name, pool in self._pools.items()})
