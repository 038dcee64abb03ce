"""A pool of workers: as many seats as it is told, each with an actor in it."""

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from control_plane.seat import Directory, Seat, SeatTimes, Tell
from control_plane.workers import Worker, WorkerActor
from kvrelay.errors import NoWorker
from kvrelay.v1.worker_pb2 import GetWorkerStatusResponse, Pool

ACTOR_THREADS = 8
"""Calls that an actor answers at a time; `start` and `ended` take one each for as long as they run."""


@dataclass(frozen=True)
class PoolPlan:
    """How a pool makes its workers."""

    pool: Pool
    name: str
    """`prefill` or `decode`; worker ids begin with it."""
    make: Callable[[Any], Worker]
    """Makes the worker in the actor's process; pickled by reference."""
    configure: Callable[[str], Any]
    """The config of the worker with this id."""
    host: str | None = "127.0.0.1"
    """Address that workers bind; None: the one under which other nodes reach theirs."""
    threads: int = 1
    cpus: float = 0
    gpus: float = 0
    resources: Callable[[], Mapping[str, float]] = dict
    """Logical resources of Ray that a worker takes; asked for at each start."""


class WorkerPool:
    """The workers of one kind. All methods run on one event loop, the directory's."""

    def __init__(self, plan: PoolPlan, directory: Directory, tell: Tell, times: SeatTimes) -> None:
        self._plan = plan
        self._directory = directory
        self._tell = tell
        self._times = times
        self._numbers = itertools.count()
        self._seats: list[Seat] = []
        self._scaling = asyncio.Lock()

    @property
    def size(self) -> int:
        """Seats, whether their workers are ready or not."""
        return len(self._seats)

    @property
    def starting(self) -> list[GetWorkerStatusResponse]:
        """The workers that are not ready, and so are in no directory."""
        return [seat.status for seat in self._seats if not seat.ready]

    @property
    def restarts(self) -> int:
        """Workers that were replaced, over the seats there are."""
        return sum(seat.restarts for seat in self._seats)

    async def scale(self, size: int) -> None:
        """Start or drain workers until there are `size`; returns when the new are ready and the removed gone.

        Raises:
            KvrelayError: a new worker cannot start; the pool has the ones that could.
        """
        async with self._scaling:
            # The ones that are not ready hold no request, and the newest have the fewest cached prefixes.
            leaving = sorted(self._seats, key=lambda seat: not seat.ready)[size:]
            joining = [self._new_seat() for _ in range(size - len(self._seats))]
            self._seats.extend(joining)
            await asyncio.gather(*(seat.leave() for seat in leaving))
            outcomes = await asyncio.gather(*(seat.first_ready for seat in joining), return_exceptions=True)
            gone = {*leaving, *(seat for seat, outcome in zip(joining, outcomes, strict=True) if outcome)}
            self._seats = [seat for seat in self._seats if seat not in gone]
            for outcome in outcomes:
                if isinstance(outcome, asyncio.CancelledError):
                    raise NoWorker(f"the {self._plan.name} pool was stopped while its workers started")
                if outcome is not None:
                    raise outcome

    async def stop(self) -> None:
        """End all workers at once."""
        seats, self._seats = self._seats, []
        await asyncio.gather(*(seat.abandon() for seat in seats))

    def _new_seat(self) -> Seat:
        return Seat(self._plan.pool, self._launch, self._directory, self._tell, self._times, self._plan.host)

    def _launch(self) -> tuple[str, Any]:
        worker_id = f"{self._plan.name}-{next(self._numbers)}"
        threads = str(self._plan.threads)
        remote: Any = ray.remote(WorkerActor)
        actor = remote.options(
            num_cpus=self._plan.cpus,
            num_gpus=self._plan.gpus,
            resources=dict(self._plan.resources()),
            # The seat itself replaces a dead worker, by one with another id and address.
            max_restarts=0,
            max_concurrency=ACTOR_THREADS,
            # Ray would set OMP_NUM_THREADS to 1 for an actor that reserves no core.
            runtime_env={
                "env_vars": {
                    "OMP_NUM_THREADS": threads,
                    "OPENBLAS_NUM_THREADS": threads,
                    "NUMBA_NUM_THREADS": threads,
                }
            },
        ).remote(self._plan.make, self._plan.configure(worker_id))
        return worker_id, actor
