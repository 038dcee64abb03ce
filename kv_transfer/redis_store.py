"""KV blocks in a Redis-protocol server, named by what they hold, so that every worker finds them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kv_transfer.block import BlockCodec, BlockHeader
from kvrelay.errors import BadBlock, BlockCorrupt, TransportLost

TTL_SECONDS = 3600
FETCH_BYTES = 1 << 20
PAUSE_SECONDS = 1.0
SCHEMES = ("redis", "redis+unix", "unix")


class BlockStore(ABC):
    """Finished blocks that outlive the request they were computed for, shared by the workers of one model."""

    @abstractmethod
    def find(self, keys: Sequence[bytes]) -> int:
        """How many leading keys have their blocks of every layer in the store; 0 where it cannot be asked."""

    @abstractmethod
    def fetch(self, wanted: Sequence[tuple[bytes, int]]) -> Iterator[tuple[BlockHeader, memoryview]]:
        """The blocks of `wanted` (key, layer), in this order.

        Raises:
            TransportLost: the store is gone.
            BlockCorrupt, BlockMismatch: a block is gone by now, or not sound. One that is not sound is
                removed, so that the next sender writes it anew.
        """


class RedisBlockStore(BlockStore):
    """The block store on a Redis-protocol server.

    A block lies at `kvrelay:block:{prefix key}:{layer}`, header and payload, as on any wire. A server whose
    memory is bounded needs an eviction policy such as allkeys-lru. Thread-safe.
    """

    def __init__(self, client: "redis.Redis", codec: BlockCodec, ttl_seconds: int = TTL_SECONDS) -> None:
        self._client = client
        self._codec = codec
        self._ttl = ttl_seconds
        self._asked_again_at = 0.0

    def find(self, keys: Sequence[bytes]) -> int:
        """As the contract says. After a failure the server is left alone for `PAUSE_SECONDS`."""
        if monotonic() < self._asked_again_at:
            return 0
        try:
            # Most prompts are new: one name a key is asked first, and all layers of those that it finds.
            leading = self._leading(keys, [0])
            return self._leading(keys[:leading], range(self._codec.layers))
        except TransportLost:
            self._asked_again_at = monotonic() + PAUSE_SECONDS
            return 0

    def fetch(self, wanted: Sequence[tuple[bytes, int]]) -> Iterator[tuple[BlockHeader, memoryview]]:
        """As the contract says, in parts of about `FETCH_BYTES`."""
        part = max(1, FETCH_BYTES // self._codec.block_bytes)
        for start in range(0, len(wanted), part):
            names = wanted[start : start + part]
            with lost_as_error():
                values = cast(list[Any], self._client.mget([_name(*name) for name in names]))
            for (key, layer), value in zip(names, values, strict=True):
                yield self._decoded(key, layer, value)

    def put(self, blocks: Sequence[tuple[BlockHeader, bytes]]) -> int:
        """Write the blocks that are not in the store, keep the others alive; returns the bytes written.

        Raises:
            TransportLost: the server cannot be reached, or has no room.
        """
        with lost_as_error(), self._client.pipeline(transaction=False) as pipe:
            for header, _ in blocks:
                pipe.expire(_name(header.key, header.layer), self._ttl)
            present = pipe.execute()
            missing = [block for block, found in zip(blocks, present, strict=True) if not found]
            for header, block in missing:
                pipe.set(_name(header.key, header.layer), block, ex=self._ttl)
            pipe.execute()
        return sum(len(block) for _, block in missing)

    def _leading(self, keys: Sequence[bytes], layers: Sequence[int]) -> int:
        with lost_as_error(), self._client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.exists(*(_name(key, layer) for layer in layers))
            counts = pipe.execute()
        return next((i for i, count in enumerate(counts) if count != len(layers)), len(keys))

    def _decoded(self, key: bytes, layer: int, value: bytes | None) -> tuple[BlockHeader, memoryview]:
        if value is None:
            raise BlockCorrupt(f"the block {key.hex()} of layer {layer} is no longer in the store")
        try:
            header, payload = self._codec.decode(value)
            if (header.key, header.layer) != (key, layer):
                found = f"{header.key.hex()} of layer {header.layer}"
                raise BlockCorrupt(f"the store holds {found} as {key.hex()} of layer {layer}")
        except BadBlock:
            with lost_as_error():
                self._client.delete(_name(key, layer))
            raise
        return header, payload


def connect(uri: str, *, timeout_seconds: float = 10.0, single: bool = False) -> "redis.Redis":
    """A client of the server at `redis://host:port/db`, `redis+unix:///path` or `unix:///path`.

    It connects on first use. `single`: now, on one connection, whose loss is always an error and never
    healed in silence.
    """
    parts = urlsplit(uri)
    options: dict[str, Any] = {
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "socket_read_size": 1 << 18,
        "retry": Retry(NoBackoff(), 0),
        "single_connection_client": single,
    }
    if parts.scheme == "redis":
        return redis.Redis.from_url(f"redis://{parts.netloc}{parts.path}", **options)
    return redis.Redis(unix_socket_path=parts.path, **options)


def inbox_of(uri: str) -> str | None:
    """The receiver that an endpoint's URI names, as in `redis+unix:///path?inbox=decode-0`."""
    return parse_qs(urlsplit(uri).query).get("inbox", [None])[0]


@contextmanager
def lost_as_error() -> Iterator[None]:
    """Turn whatever the client raises into TransportLost."""
    try:
        yield
    except (redis.RedisError, OSError) as error:
        raise TransportLost(f"the Redis server is gone or refuses: {error}") from error


def _name(key: bytes, layer: int) -> bytes:
    return b"kvrelay:block:%s:%d" % (key.hex().encode(), layer)
