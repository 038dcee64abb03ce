"""Blob stores: a blob comes back as it was put, or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kv_transfer.blob_store import BlobStore, DiskBlobs, MemoryBlobs, RedisBlobs
from kv_transfer.embedded import EmbeddedServer
from kv_transfer.redis_store import connect

Open = Callable[[], BlobStore]


@pytest.fixture(params=["memory", "disk", "redis"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path, redis_server: EmbeddedServer) -> BlobStore:
    """Each kind of store in turn."""
    stores: dict[str, Open] = {
        "memory": MemoryBlobs,
        "disk": lambda: DiskBlobs(tmp_path / "plans"),
        "redis": lambda: RedisBlobs(connect(redis_server.uri)),
    }
    return stores[request.param]()


def test_a_blob_comes_back(blobs: BlobStore) -> None:
    assert blobs.get("a plan / of two ../ parts") is None
    blobs.put("a plan / of two ../ parts", b"one")
    blobs.put("a plan / of two ../ parts", b"two")
    blobs.put("empty", b"")
    assert blobs.get("a plan / of two ../ parts") == b"two"
    assert blobs.get("empty") == b""
    assert blobs.corrupt == 0


def test_a_broken_blob_is_counted_and_not_given(blobs: BlobStore) -> None:
    blobs.put("plan", b"0123456789")
    sound = blobs._read("plan")
    assert sound is not None
    for place in range(len(sound)):
        broken = bytearray(sound)
        broken[place] ^= 1
        blobs._write("plan", bytes(broken))
        assert blobs.get("plan") is None
    for length in range(len(sound)):
        blobs._write("plan", sound[:length])
        assert blobs.get("plan") is None
    assert blobs.corrupt == 2 * len(sound)
    blobs._write("plan", sound)
    assert blobs.get("plan") == b"0123456789"


def test_the_disk_holds_whole_blobs_only(tmp_path: Path) -> None:
    blobs = DiskBlobs(tmp_path)
    for number in range(5):
        blobs.put("plan", bytes([number]) * 100)
    assert len(list(tmp_path.iterdir())) == 1
    assert DiskBlobs(tmp_path).get("plan") == bytes([4]) * 100


def test_a_store_that_is_gone_only_forgets(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    server = EmbeddedServer()
    server.stop()
    for blobs in (DiskBlobs(tmp_path / "file" / "folder"), RedisBlobs(connect(server.uri))):
        blobs.put("plan", b"bytes")
        assert blobs.get("plan") is None
        assert blobs.corrupt == 0
