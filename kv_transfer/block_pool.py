"""Which blocks of an arena are free, in use, or free but still worth something."""

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """Counts references to the block ids `0 .. capacity - 1` of an arena.

    A block that nothing refers to stays findable by its prefix key until its place is needed: the
    least recently released one is taken first. A key names a block's tokens and all before them
    (`kv_transfer.prefix`), so whoever finds it may attend to it as it is.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blank = list(range(capacity - 1, -1, -1))
        self._references: dict[int, int] = {}
        self._released: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that nothing refers to, the cached ones included."""
        return len(self._blank) + len(self._released)

    @property
    def cached(self) -> int:
        """Free blocks that a key still finds."""
        return len(self._released)

    def can_allocate(self, count: int, keys: Sequence[bytes] = ()) -> bool:
        """Whether `count` blocks can be had, of which those that leading `keys` find are shared."""
        found = [self._block_of[key] for key in keys[: self.find(keys)]]
        taken = sum(block in self._released for block in found)
        return count - len(found) <= self.free - taken

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, blank ones first.

        Raises:
            MemoryError: fewer are free; nothing is taken.
        """
        if not self.can_allocate(count):
            raise MemoryError(f"{count} blocks wanted, {self.free} of {self.capacity} free")
        taken: list[int] = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _none = self._released.popitem(last=False)
                del self._block_of[self._key_of.pop(block)]
            self._references[block] = 1
            taken.append(block)
        return taken

    def find(self, keys: Sequence[bytes]) -> int:
        """How many leading keys name blocks that are here."""
        for count, key in enumerate(keys):
            if key not in self._block_of:
                return count
        return len(keys)

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """Refer once more to the blocks of `keys`, all of which `find` has found."""
        blocks = [self._block_of[key] for key in keys]
        for block in blocks:
            self._references[block] = self._references.get(block, 0) + 1
            self._released.pop(block, None)
        return blocks

    def name(self, block: int, key: bytes) -> None:
        """Make a finished block of the caller's findable; a key that is already taken keeps its block."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each block; the last blocks of a sequence are the first to be reused."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            del self._references[block]
            if block in self._key_of:
                self._released[block] = None
            else:
                self._blank.append(block)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is in exactly one state; cheap enough to call when idle."""
        states = [*self._blank, *self._released, *self._references]
        if sorted(states) != list(range(self.capacity)):
            raise AssertionError("a block is lost, or in two states")
        if {block: key for key, block in self._block_of.items()} != self._key_of:
            raise AssertionError("keys and blocks disagree")
