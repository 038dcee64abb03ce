"""The bounded queue in which requests wait for a place at a decode and a prefill worker."""

import asyncio
from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from gateway_service.directory import WorkerDirectory
from gateway_service.router import Load, Route, Router, prefix_blocks
from gateway_service.worker import Worker
from kvrelay.errors import NoWorker, QueueFull
from kvrelay.v1.worker_pb2 import Pool

PREFILL, DECODE = Pool.POOL_PREFILL, Pool.POOL_DECODE


@dataclass
class Place:
    """A request's hold on its workers: each is given back once, in any order."""

    prefill: Worker
    decode: Worker | None
    """None where only one token is wanted."""
    _route: Route
    _admission: "Admission"
    _held: list[Worker] = field(default_factory=list)

    @property
    def workers(self) -> list[Worker]:
        """The prefill worker, and the decode worker if there is one."""
        return [self.prefill] if self.decode is None else [self.prefill, self.decode]

    def release_prefill(self) -> None:
        """Give the prefill worker back, as soon as the blocks are handed over."""
        if self.prefill in self._held:
            self._admission.router.done(self._route)
            self._give_back(self.prefill)

    def release(self) -> None:
        """Give back what is still held; calling it again does nothing."""
        self.release_prefill()
        if self.decode is not None and self.decode in self._held:
            self._give_back(self.decode)

    def _give_back(self, worker: Worker) -> None:
        self._held.remove(worker)
        worker.in_flight -= 1
        self._admission.dispatch()


@dataclass
class _Waiter:
    tokens: int
    blocks: Sequence[bytes]
    needs_decode: bool
    avoid: Set[str]
    since: float
    place: "asyncio.Future[Place]"


class Admission:
    """First come, first served; a request that goes on after a fault comes before all new ones."""

    def __init__(
        self, directory: WorkerDirectory, router: Router, max_queued: int, worker_wait_seconds: float
    ) -> None:
        """`max_queued` bounds the new requests that wait; faults are never refused for want of room."""
        self.router = router
        self._directory = directory
        self._max_queued = max_queued
        self._worker_wait_seconds = worker_wait_seconds
        self._waiters: deque[_Waiter] = deque()
        self._empty_since: dict[Pool, float] = {}
        self._expiry: asyncio.TimerHandle | None = None
        self._last_wait = 0.0
        directory.subscribe(self.dispatch, router.forget)

    @property
    def queued(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiters)

    async def take(
        self, token_ids: Sequence[int], needs_decode: bool, avoid: Set[str] = frozenset(), again: bool = False
    ) -> Place:
        """Wait for a place. Workers in `avoid` get it only where their pool has no other that is ready.

        Raises:
            QueueFull: the queue is at its bound.
            NoWorker: a pool had no ready worker for too long.
        """
        loop = asyncio.get_running_loop()
        waiter = _Waiter(
            len(token_ids), prefix_blocks(token_ids), needs_decode, avoid, loop.time(), loop.create_future()
        )
        if again:
            self._waiters.appendleft(waiter)
        else:
            self._waiters.append(waiter)
        self.dispatch()
        if not again and not waiter.place.done() and len(self._waiters) > self._max_queued:
            self._waiters.remove(waiter)
            # What the last one waited is the best guess of what the next one would.
            raise QueueFull(f"{len(self._waiters)} requests wait already", max(1.0, self._last_wait))
        try:
            return await waiter.place
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif not waiter.place.cancelled() and waiter.place.exception() is None:
                waiter.place.result().release()  # it came in the moment of the cancellation
            raise

    def dispatch(self) -> None:
        """Give places to all that can have one, in order; called whenever something has changed."""
        now = asyncio.get_running_loop().time()
        ready = {pool: self._directory.trusted(pool) for pool in (PREFILL, DECODE)}
        for pool, workers in ready.items():
            if workers:
                self._empty_since.pop(pool, None)
            else:
                self._empty_since.setdefault(pool, now)
        # A request that needs less may pass one that waits for a decode slot, but never takes a slot from it.
        for waiter in tuple(self._waiters):
            if not any(worker.has_room for worker in ready[PREFILL]):
                break
            if waiter.place.done():  # cancelled, and about to leave
                continue
            place = self._place(waiter, ready[PREFILL], ready[DECODE])
            if place is not None:
                self._waiters.remove(waiter)
                self._last_wait = now - waiter.since
                waiter.place.set_result(place)
        self._expire(now)

    def _place(self, waiter: _Waiter, prefill: list[Worker], decode: list[Worker]) -> Place | None:
        prefill = _with_room(prefill, waiter.avoid)
        decode = _with_room(decode, waiter.avoid) if waiter.needs_decode else []
        if not prefill or (waiter.needs_decode and not decode):
            return None
        held: list[Worker] = []
        if decode:
            chosen = self.router.pick_decode([Load(w.worker_id, w.in_flight, w.status.slots) for w in decode])
            held += [worker for worker in decode if worker.worker_id == chosen]
        route = self.router.pick_prefill([w.worker_id for w in prefill], waiter.tokens, waiter.blocks)
        held += [worker for worker in prefill if worker.worker_id == route.worker_id]
        for worker in held:
            worker.in_flight += 1
        return Place(held[-1], held[0] if decode else None, route, self, held)

    def _expire(self, now: float) -> None:
        """End the requests that have waited too long for a pool without workers, and look again in time."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        next_look = float("inf")
        for waiter in tuple(self._waiters):
            for pool in (PREFILL, DECODE) if waiter.needs_decode else (PREFILL,):
                if pool not in self._empty_since or waiter.place.done():
                    continue
                end = max(self._empty_since[pool], waiter.since) + self._worker_wait_seconds
                if now >= end:
                    self._waiters.remove(waiter)
                    name = "prefill" if pool == PREFILL else "decode"
                    waiter.place.set_exception(NoWorker(f"no {name} worker is ready", retry_after=5.0))
                    break
                next_look = min(next_look, end)
        if self._waiters and next_look != float("inf"):
            self._expiry = asyncio.get_running_loop().call_at(next_look, self.dispatch)


def _with_room(workers: Sequence[Worker], avoid: Set[str]) -> list[Worker]:
    """Those with a free place, of the ready workers that the request has not failed at, if there are such."""
    usable = [worker for worker in workers if worker.worker_id not in avoid] or workers
    return [worker for worker in usable if worker.has_room]
