"""The pool of an arena's blocks keeps its promises under any sequence of calls."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kv_transfer.block_pool import BlockPool

CAPACITY = 12


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, name their blocks by prefix, share, and go."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(CAPACITY)
        self.held: list[list[int]] = []
        self.named: dict[bytes, int] = {}

    @rule(family=st.integers(0, 2), length=st.integers(1, 6))
    def admit(self, family: int, length: int) -> None:
        keys = [bytes([family, index]) for index in range(length)]
        fits = self.pool.can_allocate(length, keys)
        shared = self.pool.share(keys[: self.pool.find(keys)])
        assert fits == self.pool.can_allocate(length - len(shared))
        if not fits:
            self.pool.release(shared)
            return
        fresh = self.pool.allocate(length - len(shared))
        assert not set(fresh) & {block for blocks in self.held for block in blocks}
        for key, block in zip(keys[len(shared) :], fresh, strict=True):
            self.pool.name(block, key)
        self.held.append([*shared, *fresh])
        assert self.pool.find(keys) == length

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(blocks)

    @rule()
    def take_too_much(self) -> None:
        free = self.pool.free
        with pytest.raises(MemoryError):
            self.pool.allocate(free + 1)
        assert self.pool.free == free

    @invariant()
    def nothing_is_lost(self) -> None:
        self.pool.check_integrity()
        assert self.pool.free == CAPACITY - len({block for blocks in self.held for block in blocks})


TestBlockPool = PoolMachine.TestCase


def test_the_least_recently_released_block_is_reused_first() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.name(first[0], b"first")
    pool.name(second[0], b"second")
    pool.release(second)
    pool.release(first)
    pool.allocate(2)
    assert (pool.find([b"second"]), pool.find([b"first"])) == (0, 1)


def test_the_end_of_a_sequence_is_reused_before_its_beginning() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    keys = [b"a", b"b", b"c"]
    for block, key in zip(blocks, keys, strict=True):
        pool.name(block, key)
    pool.release(blocks)
    pool.allocate(1)
    assert pool.find(keys) == 2
