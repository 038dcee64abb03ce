"""A place in a pool, in which worker after worker sits: start, watch, replace, let go."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import grpc.aio
import ray
from ray.exceptions import RayError, RayTaskError

from kvrelay.errors import BadSetup, Internal, KvrelayError, NoWorker
from kvrelay.v1.worker_pb2 import DrainRequest, GetWorkerStatusResponse, Pool, WorkerState
from kvrelay.v1.worker_pb2_grpc import WorkerServiceStub

log = logging.getLogger(__name__)

Tell = Callable[[str, str], None]
"""Called with who does something, and what, in words."""


class Directory(Protocol):
    """Who is told of workers that come and go: the gateway's WorkerDirectory."""

    def add(self, pool: Pool, worker_id: str, address: str) -> None:
        """A worker is ready."""
        ...

    def remove(self, worker_id: str) -> None:
        """A worker is gone."""
        ...

    def drain(self, worker_id: str) -> None:
        """A worker takes no new request."""
        ...

    def in_flight(self, worker_id: str) -> int:
        """Requests that have chosen a worker, whether it knows of them yet or not."""
        ...


@dataclass(frozen=True)
class SeatTimes:
    """Seconds that a seat's keeper waits for things."""

    start: float = 600.0
    silent: float = 60.0
    """An actor that answers nothing for so long is replaced."""
    ping: float = 10.0
    poll: float = 0.25
    """Between two questions what a starting worker does."""
    stop: float = 2.0
    first_backoff: float = 0.5
    """Before the first replacement; doubled with each one that follows soon."""
    last_backoff: float = 30.0
    first_tries: int = 3
    """Processes that may die before the first one was ever ready."""


class Seat:
    """Keeps one worker running, under a new id and address after each death, until it is left."""

    def __init__(
        self,
        pool: Pool,
        launch: Callable[[], tuple[str, Any]],
        directory: Directory,
        tell: Tell,
        times: SeatTimes,
        host: str | None,
    ) -> None:
        """`launch` makes a worker's id and its actor. To be called on the loop of the directory."""
        self._pool = pool
        self._launch = launch
        self._directory = directory
        self._tell = tell
        self._times = times
        self._host = host
        self._actor: Any = None
        self._address = ""
        self._leaving = False
        self.worker_id = ""
        self.ready = False
        self.activity = "waiting for a process"
        self.restarts = 0
        self.first_ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the first worker is ready, or fails with why none will be."""
        self._task = asyncio.create_task(self._keep())

    @property
    def status(self) -> GetWorkerStatusResponse:
        """What is known of a worker that is not ready and so cannot say itself."""
        return GetWorkerStatusResponse(
            worker_id=self.worker_id,
            pool=self._pool,
            state=WorkerState.WORKER_STATE_STARTING,
            activity=self.activity,
        )

    async def leave(self) -> None:
        """Let the worker finish what it has, then end it."""
        self._leaving = True
        if self.ready:
            self._directory.drain(self.worker_id)
            self._tell(self.worker_id, "draining")
            try:
                async with grpc.aio.insecure_channel(self._address) as channel:
                    stub: Any = WorkerServiceStub(channel)
                    await stub.Drain(DrainRequest())
                # Who chose this worker and comes too late still has to be sent away by it.
                while self._directory.in_flight(self.worker_id):  # noqa: ASYNC110 - it tells of no change  # noqa: ASYNC110
                    await asyncio.sleep(self._times.poll)
                async with asyncio.timeout(self._times.stop):
                    await _result(self._actor.stop.remote())
            except (grpc.aio.AioRpcError, RayError, TimeoutError) as error:
                log.warning("worker %s ended while it drained: %s", self.worker_id, error)
        await self.abandon()

    async def abandon(self) -> None:
        """End the worker at once, whatever it does."""
        self._leaving = True
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _keep(self) -> None:
        backoff = self._times.first_backoff
        try:
            while True:
                served = await self._employ()
                if self._leaving:
                    return
                backoff = self._times.first_backoff if served > self._times.last_backoff else backoff
                self.restarts += 1
                self.activity = f"its process died; the next one starts in {backoff:.1f} s"
                self._tell(self.worker_id, self.activity)
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, self._times.last_backoff)
        except KvrelayError as error:
            self.first_ready.set_exception(error)
        except Exception as error:
            log.exception("the keeper of %s failed", self.worker_id)
            if not self.first_ready.done():
                self.first_ready.set_exception(Internal(f"{self.worker_id}: {type(error).__name__}: {error}"))
        finally:
            self.first_ready.cancel()

    async def _employ(self) -> float:
        """Run one worker until it is gone; returns the seconds for which it was ready.

        Raises:
            KvrelayError: the seat's first worker cannot start.
        """
        clock = asyncio.get_running_loop().time
        since = clock()
        self.worker_id, self._actor = self._launch()
        self.activity = "waiting for a process"
        try:
            self._address = await self._start()
            since = clock()
            self._directory.add(self._pool, self.worker_id, self._address)
            self.ready = True
            self._tell(self.worker_id, "ready")
            if not self.first_ready.done():
                self.first_ready.set_result(None)
            await self._watch()
        except (RayError, KvrelayError, TimeoutError) as error:
            if not self._leaving:
                log.warning("worker %s: %s", self.worker_id, _reason(error))
            if not self.first_ready.done():
                self._give_up(error)
        finally:
            was_ready, self.ready = self.ready, False
            self._directory.remove(self.worker_id)
            ray.kill(self._actor)
        return clock() - since if was_ready else 0.0

    async def _start(self) -> str:
        started = _result(self._actor.start.remote(self._host))
        asking = asyncio.create_task(self._relay_activity())
        try:
            async with asyncio.timeout(self._times.start):
                return await started
        finally:
            asking.cancel()
            await asyncio.wait({asking})

    async def _relay_activity(self) -> None:
        """Tell what a starting worker does, whenever that changes."""
        try:
            while True:
                activity = await _result(self._actor.activity.remote())
                if activity != self.activity:
                    self.activity = activity
                    self._tell(self.worker_id, activity)
                await asyncio.sleep(self._times.poll)
        except RayError:
            return  # `start` fails for the same reason, and says so

    async def _watch(self) -> None:
        """Returns when the actor was stopped; raises when it died, or answers no more."""
        ended = _result(self._actor.ended.remote())
        try:
            while not ended.done():
                await asyncio.wait({ended}, timeout=self._times.ping)
                if not ended.done():
                    async with asyncio.timeout(self._times.silent):
                        await _result(self._actor.activity.remote())
            ended.result()
        finally:
            ended.cancel()

    def _give_up(self, error: Exception) -> None:
        """Raise where another try makes no sense."""
        if isinstance(error, TimeoutError):
            seconds = f"{self._times.start:.0f} s"
            raise BadSetup(f"{self.worker_id} was not ready within {seconds}: {self.activity}")
        if isinstance(error, RayTaskError):
            if isinstance(error.cause, KvrelayError):
                raise error.cause
            raise Internal(f"{self.worker_id}: {_reason(error)}")
        if self.restarts + 1 >= self._times.first_tries:
            raise NoWorker(f"{self.worker_id} died while it started, like those before it: {_reason(error)}")


def _result(reference: Any) -> asyncio.Future[Any]:
    """What an actor's call returns. Giving it up tells Ray nothing: its client cannot bear that."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()

    def settle(done: Future[Any]) -> None:
        if not result.done():
            error = done.exception()
            result.set_result(done.result()) if error is None else result.set_exception(error)

    def hear(done: Future[Any]) -> None:
        with suppress(RuntimeError):  # the loop has ended, and nobody waits
            loop.call_soon_threadsafe(settle, done)

    reference.future().add_done_callback(hear)
    return result


def _reason(error: BaseException) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    first = (str(cause).strip() or "no answer").split("\n", 1)[0]
    return f"{type(cause).__name__}: {first}"
