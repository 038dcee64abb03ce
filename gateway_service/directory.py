"""Which workers there are and how they do; the control plane tells who comes and goes."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import grpc.aio

from gateway_service.stream import WorkerLostError, fault_of_call
from gateway_service.worker import Worker
from kvrelay.errors import NoWorker
from kvrelay.v1.worker_pb2 import GetWorkerStatusRequest, GetWorkerStatusResponse, Pool, WorkerState

log = logging.getLogger(__name__)


class WorkerDirectory:
    """The workers of both pools, each asked for its status in turn.

    Every method runs on the gateway's event loop.
    """

    def __init__(self, poll_seconds: float = 1.0, lost_seconds: float = 10.0) -> None:
        """Ask each worker every `poll_seconds`; `lost_seconds` without an answer count as its death."""
        self._poll_seconds = poll_seconds
        self._lost_seconds = lost_seconds
        self._workers: dict[str, Worker] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._changed: list[Callable[[], None]] = []
        self._removed: list[Callable[[str], None]] = []

    def add(self, pool: Pool, worker_id: str, address: str) -> None:
        """Take a worker in; it gets requests once it says that it is ready. A known id is replaced."""
        if self._closed:
            return
        if worker_id in self._workers:
            self.remove(worker_id)
        worker = Worker(pool, worker_id, address)
        self._workers[worker_id] = worker
        self._watchers[worker_id] = asyncio.create_task(self._watch(worker))

    def remove(self, worker_id: str) -> None:
        """Forget a worker; requests with a stream there go on elsewhere. An unknown id does nothing."""
        worker = self._workers.pop(worker_id, None)
        if worker is None:
            return
        worker.draining = True
        watcher = self._watchers.pop(worker_id)
        watcher.cancel()
        worker.give_up_streams(WorkerLostError(worker_id, NoWorker("the worker was removed")))
        self._keep(worker.close())
        for callback in self._removed:
            callback(worker_id)
        self._tell()

    def drain(self, worker_id: str) -> None:
        """Send no new request to a worker; those it has go on. An unknown id does nothing."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.draining = True
            self._tell()

    def in_flight(self, worker_id: str) -> int:
        """Requests that hold a place at a worker; 0 for an unknown one."""
        worker = self._workers.get(worker_id)
        return 0 if worker is None else worker.in_flight

    def trusted(self, pool: Pool) -> list[Worker]:
        """The workers of a pool to which new requests are sent."""
        return [worker for worker in self._workers.values() if worker.pool == pool and worker.trusted]

    def ready(self, pool: Pool) -> bool:
        """Whether a pool has a worker that says it takes new requests."""
        return any(worker.pool == pool and worker.ready for worker in self._workers.values())

    def statuses(self) -> list[GetWorkerStatusResponse]:
        """What each worker last said of itself; STOPPED where it does not answer any more."""
        answers: list[GetWorkerStatusResponse] = []
        for worker in self._workers.values():
            status = GetWorkerStatusResponse()
            status.CopyFrom(worker.status)
            if worker.draining:
                status.state = WorkerState.WORKER_STATE_DRAINING
            elif not worker.answers and status.state == WorkerState.WORKER_STATE_READY:
                status.state = WorkerState.WORKER_STATE_STOPPED
                status.activity = "does not answer"
            answers.append(status)
        return answers

    async def refresh(self, seconds: float = 1.0) -> None:
        """Ask all workers now, so that `statuses` is of this moment, except for those that take longer."""
        asked = [self._keep(self._ask(worker)) for worker in self._workers.values()]
        if asked:
            await asyncio.wait(asked, timeout=seconds)

    def subscribe(self, changed: Callable[[], None], removed: Callable[[str], None] | None = None) -> None:
        """Have `changed` called when readiness or slots change, `removed` with the id of one that goes."""
        self._changed.append(changed)
        if removed is not None:
            self._removed.append(removed)

    def doubt(self, workers: Iterable[Worker]) -> None:
        """A request has failed at these: they get nothing more until they have answered a status call."""
        for worker in workers:
            worker.doubt()
        self._tell()

    async def close(self) -> None:
        """Forget all workers, wait until their channels are closed, and take in no more."""
        self._closed = True
        watchers = tuple(self._watchers.values())
        for worker_id in tuple(self._workers):
            self.remove(worker_id)
        await asyncio.gather(*watchers, *self._tasks, return_exceptions=True)

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task that `close` waits for; the event loop alone would not hold on to it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _tell(self) -> None:
        for callback in self._changed:
            callback()

    async def _watch(self, worker: Worker) -> None:
        """Ask one worker for its status for as long as it is known."""
        while True:
            worker.ask.clear()
            await self._ask(worker)
            try:
                async with asyncio.timeout(self._poll_seconds):
                    await worker.ask.wait()
            except TimeoutError:
                pass

    async def _ask(self, worker: Worker) -> None:
        before = (worker.trusted, worker.status.slots)
        try:
            worker.status = await worker.service.GetWorkerStatus(
                GetWorkerStatusRequest(), timeout=self._lost_seconds
            )
            worker.answers, worker.doubted = True, False
        except grpc.aio.AioRpcError as error:
            worker.answers = False
            fault = fault_of_call(worker.worker_id, error)
            if isinstance(fault, WorkerLostError):
                # A process that hangs breaks no connection: its streams would wait for ever.
                worker.give_up_streams(fault)
        except grpc.aio.UsageError:
            worker.answers = False  # taken out, and its channel closed, meanwhile
        if (worker.trusted, worker.status.slots) != before:
            log.info("worker %s: %s", worker.worker_id, "ready" if worker.trusted else "not ready")
            self._tell()
