"""One open stream at a worker, and what it means when it breaks."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import grpc
import grpc.aio

from kvrelay.errors import ERROR_KEY, BadBlock, KvrelayError, LeaseLost, NoWorker, Overloaded, Unavailable
from kvrelay.rpc import error_of_call

if TYPE_CHECKING:
    from gateway_service.worker import Worker

R = TypeVar("R")


class WorkerError(Exception):
    """A worker failed a request that another worker, or the same one later, may still answer."""

    def __init__(self, worker_id: str, error: KvrelayError) -> None:
        super().__init__(f"{worker_id}: {type(error).__name__}: {error}")
        self.worker_id = worker_id
        self.error = error


class WorkerLostError(WorkerError):
    """The worker itself seems gone, not only this request's work there."""


def fault_of_call(worker_id: str, error: grpc.aio.AioRpcError) -> WorkerError | KvrelayError:
    """What a failed call means: a fault that a request survives, or the error it ends with.

    A status that no kvrelay servicer has signed comes from a broken connection or a dying process.
    """
    leaf = error_of_call(error)
    if not any(key == ERROR_KEY for key, _ in error.trailing_metadata() or ()):
        return WorkerLostError(worker_id, NoWorker(f"{error.code().name}: {error.details()}"))
    if isinstance(leaf, Unavailable | BadBlock | LeaseLost | Overloaded):
        return WorkerError(worker_id, leaf)
    return leaf


class WorkerStream(Generic[R]):
    """A server stream of a worker; it stands among the worker's open streams until it is closed."""

    def __init__(self, worker: "Worker", call: "grpc.aio.UnaryStreamCall[Any, R]") -> None:
        self.worker = worker
        self._call = call
        # Not `call.read()`: that drops messages which lie unread when the status has come.
        self._events: AsyncIterator[R] = aiter(call)
        self._fault: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._reading_since: float | None = None
        self._silence = 0.0
        self._timer: asyncio.TimerHandle | None = None
        worker.streams.add(self)

    async def read(self) -> R | None:
        """The next event; None once the worker has ended the stream.

        Raises:
            WorkerError: the stream broke, or was given up.
            KvrelayError: the worker refused the request for a reason that holds everywhere.
        """
        self._reading_since = self._loop.time()
        try:
            return await anext(self._events, None)
        except grpc.aio.AioRpcError as error:
            raise fault_of_call(self.worker.worker_id, error) from None
        except asyncio.CancelledError:
            # The call raises this too when it is cancelled by `give_up`; the task then is not.
            task = asyncio.current_task()
            if self._fault is None or (task is not None and task.cancelling()):
                raise
            raise self._fault from None
        finally:
            self._reading_since = None

    async def expect(self) -> R:
        """The next event of a stream that must not have ended yet."""
        event = await self.read()
        if event is None:
            raise WorkerError(self.worker.worker_id, NoWorker("the worker's stream ended early"))
        return event

    def give_up(self, fault: Exception) -> None:
        """End the stream so that its reader gets `fault`."""
        if self._fault is None:
            self._fault = fault
            self._call.cancel()

    def allow_silence(self, seconds: float) -> None:
        """From now on, give the stream up when a read waits longer than that; infinity: never."""
        self._silence = seconds
        if self._timer is not None:
            self._timer.cancel()
        # One timer that looks again, not one a token.
        self._timer = None if seconds == float("inf") else self._loop.call_later(seconds, self._check_silence)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the stream; calling it again, or after its end, does nothing."""
        self.allow_silence(float("inf"))
        self.worker.streams.discard(self)
        self._call.cancel()

    def _check_silence(self) -> None:
        quiet = 0.0 if self._reading_since is None else self._loop.time() - self._reading_since
        if quiet >= self._silence:
            self.give_up(WorkerError(self.worker.worker_id, NoWorker(f"silent for {quiet:.1f} s")))
        else:
            self._timer = self._loop.call_later(self._silence - quiet, self._check_silence)
