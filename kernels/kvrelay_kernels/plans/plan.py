"""A live plan, and how to come by one: from what a store holds, or by building it."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvrelay_kernels.plans.counts import PlanCounts
from kvrelay_kernels.plans.key import GraphKey
from kvrelay_kernels.plans.store import PlanStore

T = TypeVar("T")

log = logging.getLogger(__name__)


class Plan(Generic[T]):
    """A live plan. Hold this, not its value alone: the value is closed once nobody holds the plan."""

    __slots__ = ("__weakref__", "value")

    def __init__(self, value: T) -> None:
        self.value = value


@dataclass(frozen=True)
class Recipe(Generic[T]):
    """How a plan is made, and what a store keeps of it."""

    build: Callable[[], T]
    dump: Callable[[T], bytes]
    load: Callable[[bytes], T]

    def find_or_build(self, key: GraphKey, store: PlanStore, counts: PlanCounts) -> Plan[T]:
        """The plan from the fastest tier that has a sound one, copied into those before; or a new one.

        `counts` takes what it took, and starts at zero. Raises whatever `build` raises.
        """
        plan = self._find(key, store, counts)
        if plan is None:
            with store.building(key):
                plan = self._find(key, store, counts)  # another process may have built it meanwhile
                if plan is None:
                    plan = self._build(key, store, counts)
        return plan

    def _find(self, key: GraphKey, store: PlanStore, counts: PlanCounts) -> Plan[T] | None:
        counts.rejected = 0  # a second search meets the same ones
        began = time.perf_counter()
        try:
            for stored in store.read(key):
                plan = self._load(key, stored.tier, stored.plan)
                if plan is None or stored.plan is None:
                    counts.rejected += 1
                    continue
                store.write(key, stored.plan, stored.place)
                counts.hits[stored.tier] += 1
                return plan
        finally:
            counts.load_seconds += time.perf_counter() - began
        return None

    def _load(self, key: GraphKey, tier: str, stored: bytes | None) -> Plan[T] | None:
        if stored is None:
            log.warning("plan %s in tier %s is cut short, changed or of another version", key, tier)
            return None
        try:
            return Plan(self.load(stored))
        except Exception as error:
            log.warning("plan %s in tier %s does not load: %r", key, tier, error)
            return None

    def _build(self, key: GraphKey, store: PlanStore, counts: PlanCounts) -> Plan[T]:
        counts.misses = 1
        began = time.perf_counter()
        try:
            value = self.build()
        except BaseException:
            counts.failures = 1
            raise
        finally:
            counts.build_seconds = time.perf_counter() - began
        counts.builds = 1
        counts.rebuilt = int(counts.rejected > 0)
        log.info("built plan %s in %.3f s", key, counts.build_seconds)
        try:
            dumped = self.dump(value)
        except Exception as error:
            log.warning("plan %s cannot be kept: %r", key, error)
        else:
            store.write(key, dumped)
        return Plan(value)
