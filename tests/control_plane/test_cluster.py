"""Embedded and joined Ray clusters."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from control_plane.cluster import Cluster, short_folder
from control_plane.config import load
from kvrelay.errors import BadSetup

BIN = Path(sys.executable).parent


def free_port() -> int:
    """A port that nobody uses now, below those that Ray gives to its workers."""
    for port in range(6500, 9900):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


@pytest.fixture
def joined(tmp_path: Path) -> Iterator[str]:
    """The client address of a cluster started by Ray's own means; its node offers both pools' resources."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    # Above the ports that Ray takes for its clients, 23000 to 24000.
    port, client_port = free_port(), 25000 + os.getpid() % 5000
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=0"]
    command += [
        f"--ray-client-server-port={client_port}",
        "--include-dashboard=false",
        f"--temp-dir={folder}",
    ]
    command += ["--resources", json.dumps({"prefill": 1, "decode": 1}), "--object-store-memory=100000000"]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 64}
    log = (tmp_path / "ray.log").open("wb")
    head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in (tmp_path / "ray.log").read_text():
            assert head.poll() is None, (tmp_path / "ray.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"ray://127.0.0.1:{client_port}"
    finally:
        # With --block, the head takes its processes along.
        head.terminate()
        head.wait(30)
        log.close()
        subprocess.run(["rm", "-rf", folder], check=True)


def test_a_cluster_offers_no_pool_resource_of_its_own(cluster: Cluster) -> None:
    assert cluster.embedded
    assert cluster.resources_for("prefill") == {}


def test_a_worker_that_reserves_no_gpu_sees_those_that_there_are(cluster: Cluster) -> None:
    name = "CUDA_VISIBLE_DEVICES"
    assert cluster.gpu_share == 0
    seen = ray.get(ray.remote(os.getenv).options(num_cpus=0, num_gpus=0).remote(name))
    assert seen == os.environ.get(name)


def test_nobody_else_can_enter_the_folder_of_an_embedded_cluster(cluster: Cluster) -> None:
    assert cluster.folder is not None
    assert cluster.folder.stat().st_mode & 0o077 == 0
    assert list(cluster.folder.glob("ray/session_*"))


def test_sockets_have_room_where_the_temporary_folder_has_a_long_name() -> None:
    assert short_folder("/var/tmp") == "/var/tmp"
    assert short_folder("/tmp/" + "long" * 20) == "/tmp"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_found_out_at_once(address: str) -> None:
    began = time.monotonic()
    with pytest.raises(BadSetup, match=r"is not usable: .*refused"):
        Cluster(load({"ray.address": address})).start()
    assert time.monotonic() - began < 20  # and not after minutes, as Ray would


def test_workers_run_on_a_cluster_of_others(joined: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 64)
    command = [str(BIN / "kvrelay"), "generate", "--ray-address", joined, "--json", "--max-tokens", "4"]
    done = subprocess.run([*command, "--prompt", "One two"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 4
    assert "Traceback" not in done.stderr
