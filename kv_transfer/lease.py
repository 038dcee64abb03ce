"""What a decode worker holds for a request, until it is released or runs out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Lock

from kvrelay.errors import LeaseLost


@dataclass(frozen=True)
class HeldLease:
    """A slot and blocks of the arena, held until `deadline` (seconds of the caller's clock)."""

    lease_id: str
    slot: int
    blocks: tuple[int, ...]
    deadline: float


class LeaseTable:
    """The leases of one decode worker. Thread-safe.

    Every lease that is granted comes out exactly once, from `release` or from `expire`; whoever gets it frees
    its slot and blocks. Close the landing of a lease before its blocks are freed.
    """

    def __init__(self) -> None:
        self._held: dict[str, HeldLease] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._held)

    def grant(self, lease_id: str, slot: int, blocks: Sequence[int], deadline: float) -> HeldLease:
        """Hold a slot and blocks. Raises ValueError where the lease or its slot is held already."""
        lease = HeldLease(lease_id, slot, tuple(blocks), deadline)
        with self._lock:
            if lease_id in self._held:
                raise ValueError(f"the lease {lease_id} is held already")
            if any(held.slot == slot for held in self._held.values()):
                raise ValueError(f"slot {slot} is held already")
            self._held[lease_id] = lease
        return lease

    def find(self, lease_id: str) -> HeldLease:
        """The lease. Raises LeaseLost where it is unknown, was released, or has been expired."""
        with self._lock:
            return self._find(lease_id)

    def renew(self, lease_id: str, deadline: float) -> HeldLease:
        """Move the deadline. Raises LeaseLost as `find` does."""
        with self._lock:
            lease = self._held[lease_id] = replace(self._find(lease_id), deadline=deadline)
        return lease

    def release(self, lease_id: str) -> HeldLease:
        """Give a lease up. Raises LeaseLost as `find` does, so that nothing is freed twice."""
        with self._lock:
            lease = self._find(lease_id)
            del self._held[lease_id]
        return lease

    def expire(self, now: float) -> list[HeldLease]:
        """Take out the leases whose deadline is `now` or has passed, earliest first."""
        with self._lock:
            late = sorted((lease for lease in self._held.values() if lease.deadline <= now), key=_deadline)
            for lease in late:
                del self._held[lease.lease_id]
        return late

    def next_deadline(self) -> float | None:
        """When `expire` will next have something to do; None while nothing is held."""
        with self._lock:
            return min((lease.deadline for lease in self._held.values()), default=None)

    def _find(self, lease_id: str) -> HeldLease:
        lease = self._held.get(lease_id)
        if lease is None:
            raise LeaseLost(f"the lease {lease_id} is unknown, was released, or ran out")
        return lease


def _deadline(lease: HeldLease) -> float:
    return lease.deadline
