"""Leases: whatever is granted comes out exactly once."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kv_transfer.lease import HeldLease, LeaseTable
from kvrelay.errors import LeaseLost

SLOTS = 5
IDS = st.sampled_from([f"lease-{number}" for number in range(8)])
TIMES = st.integers(0, 20)


class LeaseTableModel(RuleBasedStateMachine):
    """Compares the table with a plain dictionary, and counts slots and blocks as a worker would."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable()
        self.model: dict[str, HeldLease] = {}
        self.free_slots = set(range(SLOTS))
        self.free_blocks = set(range(100))

    def take_back(self, lease: HeldLease) -> None:
        """What a worker does with a lease that comes out."""
        assert self.model.pop(lease.lease_id) == lease
        assert lease.slot not in self.free_slots
        assert self.free_blocks.isdisjoint(lease.blocks)
        self.free_slots.add(lease.slot)
        self.free_blocks.update(lease.blocks)

    @rule(lease_id=IDS, slot=st.integers(0, SLOTS - 1), count=st.integers(0, 4), deadline=TIMES)
    def grant(self, lease_id: str, slot: int, count: int, deadline: float) -> None:
        blocks = sorted(self.free_blocks)[:count]
        if lease_id in self.model or slot not in self.free_slots:
            with pytest.raises(ValueError, match="held already"):
                self.table.grant(lease_id, slot, blocks, deadline)
            return
        self.model[lease_id] = self.table.grant(lease_id, slot, blocks, deadline)
        self.free_slots.remove(slot)
        self.free_blocks.difference_update(blocks)

    @rule(lease_id=IDS, deadline=TIMES)
    def renew(self, lease_id: str, deadline: float) -> None:
        if lease_id in self.model:
            self.model[lease_id] = self.table.renew(lease_id, deadline)
            assert self.model[lease_id].deadline == deadline
        else:
            with pytest.raises(LeaseLost, match=lease_id):
                self.table.renew(lease_id, deadline)

    @rule(lease_id=IDS)
    def release(self, lease_id: str) -> None:
        if lease_id in self.model:
            self.take_back(self.table.release(lease_id))
        with pytest.raises(LeaseLost, match=lease_id):
            self.table.release(lease_id)

    @rule(now=TIMES)
    def expire(self, now: float) -> None:
        late = self.table.expire(now)
        assert [lease.deadline for lease in late] == sorted(lease.deadline for lease in late)
        for lease in late:
            assert lease.deadline <= now
            self.take_back(lease)
        assert all(lease.deadline > now for lease in self.model.values())

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def find(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.model)))
        assert self.table.find(lease_id) == self.model[lease_id]

    @invariant()
    def nothing_leaks(self) -> None:
        held = self.model.values()
        assert len(self.table) == len(self.model)
        assert self.table.next_deadline() == min((lease.deadline for lease in held), default=None)
        assert len(self.free_slots) + len(held) == SLOTS
        assert len(self.free_blocks) + sum(len(lease.blocks) for lease in held) == 100


TestLeaseTable = LeaseTableModel.TestCase
