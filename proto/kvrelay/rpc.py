"""How kvrelay's services are hosted and called: a server in a thread, and errors as statuses and back."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from kvrelay.errors import BadSetup, Internal, KvrelayError, error_of_status

T = TypeVar("T")
E = TypeVar("E")

log = logging.getLogger(__name__)

MESSAGE_BYTES = 32 * 1024 * 1024
"""Largest message taken: a 10 MB prompt gets an answer that says so, not a cut connection."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
)
# Without SO_REUSEPORT a second server on a taken port fails, instead of sharing it in silence.
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (*CHANNEL_OPTIONS, ("grpc.so_reuseport", 0))


def error_of_call(error: grpc.RpcError) -> KvrelayError:
    """The leaf of the error tree that a failed call stands for, of `grpc` or `grpc.aio`."""
    if isinstance(error, grpc.aio.AioRpcError):
        trailing: Any = error.trailing_metadata()
        return error_of_status(error.code(), error.details(), tuple(trailing or ()))
    if isinstance(error, grpc.Call):
        return error_of_status(error.code(), error.details(), tuple(error.trailing_metadata() or ()))  # type: ignore[arg-type]
    return Internal(str(error))


@asynccontextmanager
async def statuses(context: "grpc.aio.ServicerContext[Any, Any]") -> AsyncGenerator[None]:
    """Turn what is raised inside into the call's status; a fault that is no KvrelayError becomes Internal."""
    try:
        yield
    except KvrelayError as error:
        await context.abort(error.code, str(error), error.trailing_metadata)
    except (asyncio.CancelledError, grpc.aio.AbortError, GeneratorExit):
        raise
    except Exception as error:
        log.exception("a call failed")
        internal = Internal(f"{type(error).__name__}: {error}")
        await context.abort(internal.code, str(internal), internal.trailing_metadata)


class Outbox(Generic[E]):
    """Brings what a thread tells the calls of one loop over to it; made on that loop.

    It is woken once for all that waits: each time takes the interpreter from the thread that computes.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[EventStream[E], E | KvrelayError | None]] = deque()
        self._woken = False

    def put(self, stream: "EventStream[E]", event: E | KvrelayError | None) -> None:
        """Leave an event for a stream; from any thread, and without effect once the loop has ended."""
        self._waiting.append((stream, event))
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # In this order: what comes in behind the last look wakes the loop again.
        self._woken = False
        while self._waiting:
            stream, event = self._waiting.popleft()
            stream.events.put_nowait(event)


class EventStream(Generic[E]):
    """What a thread tells a call, event by event, until it says None or an error. Made on the call's loop."""

    def __init__(self, outbox: Outbox[E]) -> None:
        self._outbox = outbox
        self.events: asyncio.Queue[E | KvrelayError | None] = asyncio.Queue()

    def emit(self, event: E | KvrelayError | None) -> None:
        """Add an event; from any thread."""
        self._outbox.put(self, event)

    async def __aiter__(self) -> AsyncGenerator[E]:
        while (event := await self.events.get()) is not None:
            if isinstance(event, KvrelayError):
                raise event
            yield event


class ServerThread:
    """A `grpc.aio` server on an event loop of its own, so that compute threads never stall it by waiting."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._server: grpc.aio.Server | None = None

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def start(self, register: Callable[[grpc.aio.Server], None], address: str) -> int:
        """Serve what `register` adds at `host:port`; port 0 takes a free one. Returns the port.

        Raises:
            BadSetup: the address is taken or cannot be bound.
        """
        self._thread.start()

        async def serve() -> int:
            server = grpc.aio.server(options=SERVER_OPTIONS)
            register(server)
            try:
                port = server.add_insecure_port(address)
            except RuntimeError as error:
                raise BadSetup(f"cannot listen on {address}: is another server running there?") from error
            await server.start()
            self._server = server
            return port

        try:
            return self.call(serve())
        except BadSetup:
            self.stop(0)
            raise

    def stop(self, grace: float) -> None:
        """End server and loop, giving running calls `grace` seconds; calling it again does nothing."""
        if not self._thread.is_alive():
            return
        server, self._server = self._server, None
        if server is not None:
            self.call(server.stop(grace))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
