"""The channel through a Redis-protocol server: blocks go to the store, their names to an inbox."""

import logging
import struct
from collections.abc import Sequence
from contextlib import suppress
from threading import Event, Thread
from typing import cast

from google.protobuf.message import DecodeError

from kv_transfer.block import KEY_BYTES, BlockCodec, BlockHeader
from kv_transfer.landing import Landing, Landings
from kv_transfer.queued import ThreadChannel, ThreadSender
from kv_transfer.redis_store import TTL_SECONDS, RedisBlockStore, connect, inbox_of, lost_as_error
from kvrelay.errors import BlockCorrupt, KvrelayError, LeaseLost, TransportLost
from kvrelay.v1.transfer_pb2 import Commit

MANIFEST = b"KVRM"
COMMIT = b"KVRC"
ABORT = b"KVRA"

POLL_SECONDS = 0.25
RECONNECT_SECONDS = (0.05, 1.0)
"""First and longest pause between two tries to reach the server again."""

_log = logging.getLogger(__name__)
_RECORD = struct.Struct("<4sH")
_ENTRY = struct.Struct(f"<{KEY_BYTES}sI")


class RedisChannel(ThreadChannel):
    """The transport of `redis`, `redis+unix` and `unix`. A hand-over is done when the server has its commit.

    The endpoint names the receiver, as `RedisReceiver.endpoint` does. Without `?inbox=` the blocks are
    stored and nobody is told: this is how a prefill worker shares the prefixes it has computed.
    """

    def __init__(self, endpoint: str, codec: BlockCodec, ttl_seconds: int = TTL_SECONDS) -> None:
        super().__init__()
        self._codec = codec
        self._inbox = inbox_of(endpoint)
        self._ttl = ttl_seconds
        self._client = connect(endpoint)
        self._store = RedisBlockStore(self._client, codec, ttl_seconds)

    def close(self) -> None:
        """Give up what still runs, and close the connections."""
        super().close()
        self._client.close()

    @property
    def codec(self) -> BlockCodec:
        """Of the blocks that it carries."""
        return self._codec

    def _sender(self, lease_id: str) -> ThreadSender:
        return _RedisSender(self, lease_id)

    def put(self, blocks: Sequence[tuple[BlockHeader, bytes]]) -> int:
        """Store blocks; returns the bytes written. Raises TransportLost."""
        return self._store.put(blocks)

    def tell(self, magic: bytes, lease_id: str, body: bytes) -> None:
        """Put a record into the receiver's inbox. Raises TransportLost."""
        if self._inbox is None:
            return
        lease = lease_id.encode()
        with lost_as_error(), self._client.pipeline(transaction=False) as pipe:
            pipe.rpush(_inbox_name(self._inbox), _RECORD.pack(magic, len(lease)) + lease + body)
            # An inbox that nobody empties any more goes with its worker.
            pipe.expire(_inbox_name(self._inbox), self._ttl)
            pipe.execute()


class _RedisSender(ThreadSender):
    def __init__(self, channel: RedisChannel, lease_id: str) -> None:
        super().__init__(channel.codec, lease_id)
        self._channel = channel

    def _deliver(self, blocks: list[tuple[BlockHeader, bytes]]) -> int:
        written = self._channel.put(blocks)
        names = b"".join(_ENTRY.pack(header.key, header.layer) for header, _ in blocks)
        self._channel.tell(MANIFEST, self.lease_id, names)
        return written

    def _conclude(self, commit: Commit) -> None:
        self._channel.tell(COMMIT, self.lease_id, commit.SerializeToString())

    def _retract(self) -> None:
        self._channel.tell(ABORT, self.lease_id, b"")


class RedisReceiver:
    """The decode worker's receiver: one thread that empties its inbox and lands what the records name.

    When the connection is lost, every lease that waits fails with TransportLost, for nobody knows what was in
    the inbox; the thread goes on trying to connect, and later leases work again.
    """

    def __init__(self, uri: str, inbox: str, landings: Landings) -> None:
        """Connect. `inbox` is this worker's own name. Raises TransportLost."""
        self._uri, self._inbox, self._landings = uri, inbox, landings
        with lost_as_error():
            self._client = connect(uri, single=True)
        self._store = RedisBlockStore(self._client, landings.codec)
        self._stopping = Event()
        self._thread = Thread(target=self._run, name=f"kv-inbox-{inbox}", daemon=True)

    @property
    def endpoint(self) -> str:
        """The URI for the leases of this worker."""
        return f"{self._uri}?inbox={self._inbox}"

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; leases that wait fail with TransportLost."""
        self._stopping.set()
        self._thread.join()
        self._landings.fail_all(TransportLost(f"the receiver {self._inbox} has stopped"))
        with suppress(TransportLost), lost_as_error():
            self._client.delete(_inbox_name(self._inbox))
        self._client.close()

    def _run(self) -> None:
        shortest, longest = RECONNECT_SECONDS
        pause = shortest
        while not self._stopping.is_set():
            try:
                with lost_as_error():
                    popped = self._client.blpop([_inbox_name(self._inbox)], timeout=POLL_SECONDS)
                pause = shortest
                if popped is not None:
                    self._handle(cast(bytes, popped[1]))
            except TransportLost as error:
                self._landings.fail_all(error)
                self._stopping.wait(pause)
                pause = min(2 * pause, longest)

    def _handle(self, record: bytes) -> None:
        try:
            magic, length = _RECORD.unpack_from(record)
            lease_id = record[_RECORD.size :][:length].decode()
        except (struct.error, UnicodeDecodeError):
            _log.warning("a record of %d bytes in the inbox %s cannot be read", len(record), self._inbox)
            return
        try:
            landing = self._landings.find(lease_id)
        except LeaseLost:
            return
        try:
            self._follow(landing, magic, record[_RECORD.size + length :])
        except TransportLost:
            raise
        except KvrelayError as error:
            landing.fail(error)

    def _follow(self, landing: Landing, magic: bytes, body: bytes) -> None:
        try:
            if magic == MANIFEST:
                for header, payload in self._store.fetch(list(_ENTRY.iter_unpack(body))):
                    landing.put(header, payload)
            elif magic == COMMIT:
                landing.commit(Commit.FromString(body))
            elif magic == ABORT:
                landing.fail(landing.abandoned())
            else:
                raise BlockCorrupt(f"a record of lease {landing.lease_id} begins with {magic!r}")
        except (struct.error, DecodeError) as error:
            raise BlockCorrupt(f"a record of lease {landing.lease_id} cannot be read: {error}") from error


def _inbox_name(inbox: str) -> str:
    return f"kvrelay:inbox:{inbox}"
