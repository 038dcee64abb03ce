"""Live plans, each built or loaded once: an LRU over the tiers of a `PlanStore`."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from kvrelay_kernels.plans.counts import LIVE, PlanCounts
from kvrelay_kernels.plans.key import GraphKey
from kvrelay_kernels.plans.plan import Plan, Recipe
from kvrelay_kernels.plans.store import PlanStore

T = TypeVar("T")


class PlanCache(Generic[T]):
    """Plans of one kind by key; safe to call from several threads.

    The cache holds the `capacity` plans that were used last. One beyond that is let go of, never refused, and
    lives on for as long as somebody holds it: asked for again meanwhile, it is found, not built anew.
    """

    def __init__(self, store: PlanStore, capacity: int, close: Callable[[T], None] | None = None) -> None:
        """`close` frees a plan's value, on any thread; it must not call the cache.

        Raises:
            ValueError: the capacity is less than one.
        """
        if capacity < 1:
            raise ValueError(f"a cache cannot hold {capacity} plans")
        self._store = store
        self._capacity = capacity
        self._close = close
        self._lock = threading.Lock()
        self._kept: OrderedDict[GraphKey, Plan[T]] = OrderedDict()
        self._living: weakref.WeakValueDictionary[GraphKey, Plan[T]] = weakref.WeakValueDictionary()
        self._flights: dict[GraphKey, _Flight[T]] = {}
        self._counts = PlanCounts()

    def get(
        self,
        key: GraphKey,
        build: Callable[[], T],
        dump: Callable[[T], bytes],
        load: Callable[[bytes], T],
    ) -> Plan[T]:
        """The plan of a key: live, or loaded from the fastest tier that holds it, or built and kept in all.

        Threads that ask for a key while it is loaded or built wait and get the same plan, or the same
        exception; of processes that share a folder, one builds and the others load. A stored plan that cannot
        be trusted, or that `load` refuses, is built anew.

        Args:
            key: what decides the plan. Its bytes are made once: keep it where a plan is asked for often.
            build: makes it; may ask this cache for other keys.
            dump: its bytes. What it raises is logged, and the plan is not stored.
            load: the plan of such bytes; raises where they are of no use here.

        Raises:
            RuntimeError: `build` asked for its own key.
            Exception: whatever `build` raised; the next call builds again.
        """
        with self._lock:
            plan = self._living.get(key)
            flight = self._flights.get(key)
            if plan is not None:
                self._counts.hits[LIVE] += 1
            elif flight is not None:
                self._counts.shared += 1
            else:
                self._flights[key] = _Flight()
        if plan is None:
            if flight is not None:
                return flight.join(key)
            plan = self._fly(key, Recipe(build, dump, load))
        self._keep(key, plan)
        return plan

    @property
    def counts(self) -> PlanCounts:
        """The counters, as they are now."""
        with self._lock:
            return self._counts.copy()

    @property
    def kept(self) -> int:
        """Plans that the cache holds."""
        return len(self._kept)

    def clear(self) -> None:
        """Let go of all plans; the stores keep theirs."""
        with self._lock:
            kept, self._kept = self._kept, OrderedDict()
        kept.clear()  # not under the lock: this may close plans

    def _fly(self, key: GraphKey, recipe: Recipe[T]) -> Plan[T]:
        """Find or build on behalf of all who wait for the flight that this thread has opened."""
        counts = PlanCounts()
        try:
            plan = recipe.find_or_build(key, self._store, counts)
        except BaseException as error:
            self._land(key, counts, None).set_exception(error)
            raise
        if self._close is not None:
            # Not at the interpreter's exit, when the device may be gone already.
            weakref.finalize(plan, self._close, plan.value).atexit = False
        self._land(key, counts, plan).set_result(plan)
        return plan

    def _land(self, key: GraphKey, counts: PlanCounts, plan: Plan[T] | None) -> "Future[Plan[T]]":
        with self._lock:
            self._counts += counts
            if plan is not None:
                self._living[key] = plan
            return self._flights.pop(key).plan

    def _keep(self, key: GraphKey, plan: Plan[T]) -> None:
        let_go: list[Plan[T]] = []  # closed at the end, not under the lock
        with self._lock:
            self._kept[key] = plan
            self._kept.move_to_end(key)
            while len(self._kept) > self._capacity:
                let_go.append(self._kept.popitem(last=False)[1])
                self._counts.evictions += 1


class _Flight(Generic[T]):
    """One search or build, by the thread that opened it, for all who ask meanwhile."""

    def __init__(self) -> None:
        self.plan: Future[Plan[T]] = Future()
        self._owner = threading.get_ident()

    def join(self, key: GraphKey) -> Plan[T]:
        """Wait for the end; gives its plan, or raises its exception."""
        if self._owner == threading.get_ident():
            raise RuntimeError(f"building plan {key} asks for that plan itself")
        return self.plan.result()
