"""Pools against real Ray actors: start, failures, restarts, drains."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from control_plane.cluster import Cluster
from control_plane.pool import PoolPlan, WorkerPool
from control_plane.seat import SeatTimes
from kvrelay.errors import ModelFileInvalid, NoWorker
from kvrelay.v1.worker_pb2 import GetWorkerStatusRequest, GetWorkerStatusResponse, Pool, WorkerState
from kvrelay.v1.worker_pb2_grpc import WorkerServiceStub
from tests.control_plane.little_worker import LittleConfig, LittleWorker

QUICK = SeatTimes(start=60, ping=0.2, silent=2.0, poll=0.02, first_backoff=0.05, last_backoff=0.2)


class Register:
    """A directory that remembers what it was told."""

    def __init__(self) -> None:
        self.addresses: dict[str, str] = {}
        self.draining: set[str] = set()
        self.chosen: dict[str, int] = {}

    def add(self, pool: Pool, worker_id: str, address: str) -> None:
        """A worker came."""
        self.addresses[worker_id] = address

    def remove(self, worker_id: str) -> None:
        """A worker went."""
        self.addresses.pop(worker_id, None)

    def drain(self, worker_id: str) -> None:
        """A worker takes nothing more."""
        self.draining.add(worker_id)

    def in_flight(self, worker_id: str) -> int:
        """Requests on their way to a worker."""
        return self.chosen.get(worker_id, 0)


class Bench:
    """A pool of little workers, and everything that a test looks at."""

    def __init__(self, switches: Path) -> None:
        self.switches = switches
        self.register = Register()
        self.told: list[tuple[str, str]] = []
        plan = PoolPlan(
            pool=Pool.POOL_PREFILL,
            name="prefill",
            make=LittleWorker,
            configure=partial(LittleConfig, switches=switches),
            threads=2,
        )
        self.pool = WorkerPool(plan, self.register, lambda who, what: self.told.append((who, what)), QUICK)

    def switch(self, name: str, on: bool = True) -> None:
        """Give an order to all workers, or take it back."""
        (self.switches / name).touch() if on else (self.switches / name).unlink()

    async def ask(self, worker_id: str) -> GetWorkerStatusResponse:
        """What a worker says of itself."""
        async with grpc.aio.insecure_channel(self.register.addresses[worker_id]) as channel:
            stub: Any = WorkerServiceStub(channel)
            return await stub.GetWorkerStatus(GetWorkerStatusRequest())


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
async def bench(cluster: Cluster, tmp_path: Path) -> AsyncIterator[Bench]:
    """A pool that is empty before and after."""
    bench = Bench(tmp_path)
    yield bench
    await bench.pool.stop()
    assert bench.register.addresses == {}


async def test_workers_start_and_get_their_threads(bench: Bench) -> None:
    await bench.pool.scale(2)
    assert sorted(bench.register.addresses) == ["prefill-0", "prefill-1"]
    status = await bench.ask("prefill-1")
    assert (status.worker_id, status.activity) == ("prefill-1", "2")
    assert bench.pool.starting == []


async def test_a_starting_worker_says_what_it_does(bench: Bench) -> None:
    bench.switch("slow")
    scaling = asyncio.create_task(bench.pool.scale(1))
    await until(lambda: ("prefill-0", "loading weights 50%") in bench.told)
    (status,) = bench.pool.starting
    assert (status.state, status.activity) == (WorkerState.WORKER_STATE_STARTING, "loading weights 50%")
    bench.switch("slow", on=False)
    await scaling
    assert bench.told[-1] == ("prefill-0", "ready")


async def test_a_killed_worker_is_replaced_under_a_new_id(bench: Bench) -> None:
    await bench.pool.scale(1)
    os.kill((await bench.ask("prefill-0")).requests, signal.SIGKILL)
    await until(lambda: "prefill-0" not in bench.register.addresses)
    await until(lambda: "prefill-1" in bench.register.addresses)
    assert (bench.pool.size, bench.pool.restarts) == (1, 1)
    assert (await bench.ask("prefill-1")).state == WorkerState.WORKER_STATE_READY


async def test_a_worker_that_answers_nothing_is_replaced(bench: Bench) -> None:
    await bench.pool.scale(1)
    bench.switch("mute")
    await until(lambda: "prefill-0" not in bench.register.addresses)
    bench.switch("mute", on=False)
    await until(lambda: "prefill-1" in bench.register.addresses)


async def test_a_worker_drains_before_it_goes(bench: Bench) -> None:
    await bench.pool.scale(2)
    bench.switch("busy")
    scaling = asyncio.create_task(bench.pool.scale(1))
    await until(lambda: bool(bench.register.draining))
    (leaver,) = bench.register.draining
    while (await bench.ask(leaver)).state != WorkerState.WORKER_STATE_DRAINING:
        await asyncio.sleep(0.01)
    assert not scaling.done()
    bench.switch("busy", on=False)
    await scaling
    assert (bench.pool.size, leaver in bench.register.addresses) == (1, False)


async def test_a_drained_worker_stays_for_requests_that_are_on_their_way(bench: Bench) -> None:
    await bench.pool.scale(2)
    bench.register.chosen = dict.fromkeys(bench.register.addresses, 1)
    scaling = asyncio.create_task(bench.pool.scale(1))
    await until(lambda: bool(bench.register.draining))
    (leaver,) = bench.register.draining
    while (await bench.ask(leaver)).state != WorkerState.WORKER_STATE_DRAINING:
        await asyncio.sleep(0.01)
    assert leaver in bench.register.addresses
    bench.register.chosen.clear()
    await scaling
    assert leaver not in bench.register.addresses


async def test_a_worker_that_dies_while_it_drains_is_not_replaced(bench: Bench) -> None:
    await bench.pool.scale(2)
    pids = {worker: (await bench.ask(worker)).requests for worker in bench.register.addresses}
    bench.switch("busy")
    scaling = asyncio.create_task(bench.pool.scale(1))
    await until(lambda: bool(bench.register.draining))
    (leaver,) = bench.register.draining
    while (await bench.ask(leaver)).state != WorkerState.WORKER_STATE_DRAINING:
        await asyncio.sleep(0.01)
    os.kill(pids[leaver], signal.SIGKILL)
    await scaling
    assert set(bench.register.addresses) == set(pids) - {leaver}


async def test_the_error_of_a_worker_that_cannot_start_is_told_as_it_is(bench: Bench) -> None:
    bench.switch("broken")
    with pytest.raises(ModelFileInvalid, match="the file ends in the middle of a tensor"):
        await bench.pool.scale(2)
    assert bench.pool.size == 0
    bench.switch("broken", on=False)
    await bench.pool.scale(1)
    assert len(bench.register.addresses) == 1


async def test_workers_that_die_while_they_start_are_given_up(bench: Bench) -> None:
    bench.switch("deadly")
    with pytest.raises(NoWorker, match="prefill-2 died while it started, like those before it"):
        await bench.pool.scale(1)
    assert bench.pool.size == 0


async def test_stopping_interrupts_a_start(bench: Bench) -> None:
    bench.switch("slow")
    scaling = asyncio.create_task(bench.pool.scale(1))
    await until(lambda: bool(bench.told))
    await bench.pool.stop()
    with pytest.raises(NoWorker, match="stopped"):
        await scaling
