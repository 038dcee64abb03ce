"""Blob stores: a blob comes back as it was put, or not at all."""

from collections.abc import Callable

import pytest

from kv_transfer.blob_store import BlobStore, MemoryBlobs, RedisBlobs
from kv_transfer.embedded import EmbeddedServer
from kv_transfer.redis_store import connect
from kvrelay_kernels.plans import DeviceClass, GraphKey, PlanCache, PlanStore, Tier

Open = Callable[[], BlobStore]


@pytest.fixture(params=["memory", "redis"])
def blobs(request: pytest.FixtureRequest, redis_server: EmbeddedServer) -> BlobStore:
    """Each kind of store in turn."""
    stores: dict[str, Open] = {
        "memory": MemoryBlobs,
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


def test_a_store_that_is_gone_only_forgets() -> None:
    server = EmbeddedServer()
    server.stop()
    blobs = RedisBlobs(connect(server.uri))
    blobs.put("plan", b"bytes")
    assert blobs.get("plan") is None
    assert blobs.corrupt == 0


def test_what_one_worker_built_the_next_one_loads(blobs: BlobStore) -> None:
    key = GraphKey.of("cubin", DeviceClass((9, 0)))

    def worker() -> PlanCache[bytes]:
        return PlanCache(PlanStore([Tier("own", MemoryBlobs()), Tier("fleet", blobs)]), capacity=1)

    first, second = worker(), worker()
    assert first.get(key, lambda: b"plan", bytes, bytes).value == b"plan"
    assert second.get(key, lambda: pytest.fail("built again"), bytes, bytes).value == b"plan"
    assert second.counts.hits == {"fleet": 1}
    second.clear()
    second.get(key, lambda: pytest.fail("built again"), bytes, bytes)
    assert second.counts.hits == {"fleet": 1, "own": 1}
