"""Named blobs that are dear to make and may be lost at any time: tiers of a store of compiled plans."""

import struct
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import cast

import redis
import xxhash

_HEADER = struct.Struct("<4sIQ")
_MAGIC = b"KVRP"
_VERSION = 1


class BlobStore(ABC):
    """Gets and puts blobs behind a header of magic, version and xxh3-64. A store that fails only forgets."""

    def __init__(self) -> None:
        self.corrupt = 0
        """Blobs that were found and not used, for their header or checksum was wrong."""

    def get(self, name: str) -> bytes | None:
        """The blob; None where it is unknown, not sound, or the store is gone."""
        stored = self._read(name)
        if stored is None:
            return None
        blob = stored[_HEADER.size :]
        if stored[: _HEADER.size] != _header(blob):
            self.corrupt += 1
            return None
        return blob

    def put(self, name: str, blob: bytes) -> None:
        """Keep a blob under a name, in place of the one before."""
        self._write(name, _header(blob) + blob)

    @abstractmethod
    def _read(self, name: str) -> bytes | None: ...

    @abstractmethod
    def _write(self, name: str, stored: bytes) -> None: ...


class MemoryBlobs(BlobStore):
    """In this process."""

    def __init__(self) -> None:
        super().__init__()
        self._blobs: dict[str, bytes] = {}

    def _read(self, name: str) -> bytes | None:
        return self._blobs.get(name)

    def _write(self, name: str, stored: bytes) -> None:
        self._blobs[name] = stored


class RedisBlobs(BlobStore):
    """On a Redis-protocol server, for all workers of a cluster."""

    def __init__(self, client: "redis.Redis") -> None:
        super().__init__()
        self._client = client

    def _read(self, name: str) -> bytes | None:
        try:
            return cast(bytes | None, self._client.get(f"kvrelay:blob:{name}"))
        except (redis.RedisError, OSError):
            return None

    def _write(self, name: str, stored: bytes) -> None:
        with suppress(redis.RedisError, OSError):
            self._client.set(f"kvrelay:blob:{name}", stored)


def _header(blob: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, _VERSION, xxhash.xxh3_64_intdigest(blob))
