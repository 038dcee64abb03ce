"""Which worker holds which prefix, as far as one knows: what routing by prefix affinity goes by."""

from collections import OrderedDict
from collections.abc import Sequence


class PrefixDirectory:
    """Prefix keys and the workers that have their blocks. Bounded: the keys used longest ago are forgotten.

    A hint, never a promise: a worker may have dropped a block since. Used by one thread.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._workers: OrderedDict[bytes, set[str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._workers)

    def note(self, worker: str, keys: Sequence[bytes]) -> None:
        """`worker` has the blocks of `keys`, a prompt's first ones in order."""
        # Backwards, so that of one prompt the last key is forgotten first: leading ones serve more prompts.
        for key in reversed(keys):
            self._workers.setdefault(key, set()).add(worker)
            self._workers.move_to_end(key)
        while len(self._workers) > self.capacity:
            self._workers.popitem(last=False)

    def forget(self, worker: str) -> None:
        """`worker` has gone, and its blocks with it."""
        for key, workers in list(self._workers.items()):
            workers.discard(worker)
            if not workers:
                del self._workers[key]

    def best(self, keys: Sequence[bytes]) -> dict[str, int]:
        """How many leading blocks of `keys` each worker has; workers with none are left out."""
        leading: dict[str, int] = {}
        for count, key in enumerate(keys):
            having = {worker for worker in self._workers.get(key, ()) if leading.get(worker, 0) == count}
            if not having:
                break
            for worker in having:
                leading[worker] = count + 1
        return leading
