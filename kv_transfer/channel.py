"""The contract of a channel, over which a prefill worker hands a prompt's blocks to a decode worker."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock

from kv_transfer.block import BlockCodec, BlockHeader
from kvrelay.errors import BadSetup
from kvrelay.v1.prefill_pb2 import Lease


@dataclass(frozen=True)
class Handover:
    """What one hand-over cost."""

    blocks: int
    """Blocks handed over, those included that the store had already."""
    bytes: int
    """Bytes on the wire."""
    seconds: float
    """Time that computation did not hide: blocked in `send`, and from `commit` to the end."""


class Sender(ABC):
    """One hand-over, from the prefill engine's side. Used by one thread.

    A payload given to `send` is read later, by another thread: its bytes must stay as they are until
    the future of `commit` is done, `abort` has returned, or a method has raised.
    """

    @abstractmethod
    def send(self, header: BlockHeader, payload: memoryview) -> None:
        """Queue a finished block. Waits only while the queue is full.

        Raises:
            TransportLost, LeaseLost, BlockCorrupt, BlockMismatch: an earlier block could not be handed over.
        """

    @abstractmethod
    def commit(self, tokens: int, first_token: int) -> Future[Handover]:
        """End the hand-over of `tokens` tokens; `first_token` is the one that prefill drew.

        Does not wait: the future is done when the channel has taken everything, or has failed. Raises as
        `send` does.
        """

    @abstractmethod
    def abort(self) -> None:
        """Give the hand-over up; the receiver's lease fails at once. Does nothing after the end."""


class Channel(ABC):
    """A connection to one endpoint, shared by all hand-overs to it."""

    @abstractmethod
    def open(self, lease_id: str) -> Sender:
        """Begin the hand-over of a lease; does not wait for the peer."""

    @abstractmethod
    def close(self) -> None:
        """End the connection; hand-overs that still run are given up."""


Transport = Callable[[str, BlockCodec], Channel]
"""Makes the channel to an endpoint's URI."""


class Channels:
    """The channels of one prefill worker, made on first use from the scheme of a lease's endpoint."""

    def __init__(self, codec: BlockCodec, transports: Mapping[str, Transport]) -> None:
        self._codec = codec
        self._transports = transports
        self._open: dict[str, Channel] = {}
        self._lock = Lock()

    def open(self, lease: Lease) -> Sender:
        """Begin the hand-over of `lease`.

        Raises:
            BadSetup: nothing is known of the endpoint's scheme.
        """
        with self._lock:
            channel = self._open.get(lease.endpoint)
            if channel is None:
                scheme = lease.endpoint.partition("://")[0]
                transport = self._transports.get(scheme)
                if transport is None:
                    known = ", ".join(self._transports)
                    raise BadSetup(f"no channel for the endpoint {lease.endpoint!r}; known schemes: {known}")
                channel = self._open[lease.endpoint] = transport(lease.endpoint, self._codec)
        return channel.open(lease.lease_id)

    def close(self) -> None:
        """Close every channel."""
        with self._lock:
            channels = list(self._open.values())
            self._open.clear()
        for channel in channels:
            channel.close()
