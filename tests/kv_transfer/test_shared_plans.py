"""A kernel that one machine compiled is machine code at hand for the next."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kv_transfer.blob_store import RedisBlobs
from kv_transfer.embedded import EmbeddedServer
from kv_transfer.redis_store import connect
from kvrelay_kernels.cuda.module import KernelCache, KernelKey
from kvrelay_kernels.cuda.nvrtc import library
from kvrelay_kernels.errors import BackendUnavailable
from kvrelay_kernels.plans import Tier, open_plans

KEY = KernelKey.of("decode_plan", {}, "sm_90a")


@pytest.fixture(autouse=True)
def nvrtc() -> None:
    try:
        library()
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    """One that knows no plan yet."""
    started = EmbeddedServer()
    yield started
    started.stop()


def machine(folder: Path, server: EmbeddedServer) -> KernelCache:
    """A worker on a machine whose own folder is `folder`."""
    return KernelCache(open_plans(folder, [Tier("redis", RedisBlobs(connect(server.uri)))]))


def test_a_new_machine_compiles_nothing(server: EmbeddedServer, tmp_path: Path) -> None:
    first, second, again = (machine(tmp_path / name, server) for name in ("a", "b", "b"))
    cubin = first.cubin(KEY)
    assert (first.counts.builds, first.counts.hits) == (1, {})
    assert second.cubin(KEY) == cubin
    assert (second.counts.builds, second.counts.hits) == (0, {"redis": 1})
    assert again.cubin(KEY) == cubin
    assert (again.counts.builds, again.counts.hits) == (0, {"disk": 1})


def test_a_server_that_is_gone_costs_a_compilation(server: EmbeddedServer, tmp_path: Path) -> None:
    cache = machine(tmp_path / "a", server)
    server.stop()
    assert cache.cubin(KEY)[:4] == b"\x7fELF"
    assert cache.counts.builds == 1
    assert machine(tmp_path / "a", server).cubin(KEY)[:4] == b"\x7fELF"


def test_rubbish_on_the_server_is_not_run(server: EmbeddedServer, tmp_path: Path) -> None:
    client: Any = connect(server.uri)
    sound = machine(tmp_path / "a", server).cubin(KEY)
    for name in client.keys("kvrelay:blob:*"):
        client.set(name, client.get(name)[:-1] + b"?")
    cache = machine(tmp_path / "b", server)
    assert cache.cubin(KEY) == sound
    assert cache.counts.builds == 1
