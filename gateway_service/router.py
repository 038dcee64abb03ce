"""Which worker a request goes to: pure policy, without connections or clocks."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from kv_transfer.prefix import BLOCK_TOKENS, prefix_keys


def prefix_blocks(token_ids: Sequence[int]) -> list[bytes]:
    """A key for each whole leading block of 64 tokens, which names that block and all before it."""
    # There is one model behind a gateway, so the keys need not tell models apart.
    return prefix_keys(token_ids, 0, 0)[: len(token_ids) // BLOCK_TOKENS]


@dataclass(frozen=True)
class Load:
    """How much of a decode worker is taken."""

    worker_id: str
    in_flight: int
    slots: int
    """0: not told."""


@dataclass(frozen=True)
class Route:
    """A prompt sent to a prefill worker."""

    worker_id: str
    tokens: int
    """Tokens of it that the worker is expected to compute."""


class Router:
    """Decode: the least loaded. Prefill: the fewest tokens to compute, without prefixes sent there before.

    A worker that holds a prefix is chosen only while its lead in work is less than what the prefix saves, so
    that no worker is left idle by affinity; among equals the one chosen longest ago is taken.
    """

    def __init__(self, blocks_remembered: int = 512) -> None:
        """Remember that many blocks a worker, about as many as its cache holds."""
        self._blocks_remembered = blocks_remembered
        self._prefixes: dict[str, OrderedDict[bytes, None]] = {}
        self._pending: dict[str, int] = {}
        self._chosen: dict[str, int] = {}
        self._choices = 0

    def pick_decode(self, loads: Sequence[Load]) -> str:
        """The worker with the smallest share of its slots taken."""
        return self._choose(
            min(
                loads,
                key=lambda load: (
                    load.in_flight / load.slots if load.slots else load.in_flight,
                    self._chosen.get(load.worker_id, 0),
                ),
            ).worker_id
        )

    def pick_prefill(self, worker_ids: Sequence[str], tokens: int, blocks: Sequence[bytes]) -> Route:
        """The worker that would be through with this prompt first; the route counts as work until `done`."""
        best: tuple[int, int, str] | None = None
        for worker_id in worker_ids:
            work = self.pending(worker_id) + tokens - self.shared_blocks(worker_id, blocks) * BLOCK_TOKENS
            rank = (work, self._chosen.get(worker_id, 0), worker_id)
            best = rank if best is None else min(best, rank)
        if best is None:
            raise ValueError("no worker to choose from")
        worker_id = self._choose(best[2])
        # Even a prompt that is wholly cached has its last token computed.
        route = Route(worker_id, max(1, tokens - self.shared_blocks(worker_id, blocks) * BLOCK_TOKENS))
        self._pending[worker_id] = self.pending(worker_id) + route.tokens
        self._remember(worker_id, blocks)
        return route

    def done(self, route: Route) -> None:
        """The prefill worker is through with a route, or has failed it."""
        left = self.pending(route.worker_id) - route.tokens
        if left > 0:
            self._pending[route.worker_id] = left
        else:
            self._pending.pop(route.worker_id, None)

    def forget(self, worker_id: str) -> None:
        """A worker has gone, and what it had cached with it."""
        self._prefixes.pop(worker_id, None)
        self._chosen.pop(worker_id, None)

    def pending(self, worker_id: str) -> int:
        """Prompt tokens that a prefill worker still has to compute."""
        return self._pending.get(worker_id, 0)

    def shared_blocks(self, worker_id: str, blocks: Sequence[bytes]) -> int:
        """Leading blocks that were sent to this worker before."""
        known = self._prefixes.get(worker_id)
        if not known:
            return 0
        for count, block in enumerate(blocks):
            if block not in known:
                return count
        return len(blocks)

    def _choose(self, worker_id: str) -> str:
        self._choices += 1
        self._chosen[worker_id] = self._choices
        return worker_id

    def _remember(self, worker_id: str, blocks: Sequence[bytes]) -> None:
        known = self._prefixes.setdefault(worker_id, OrderedDict())
        # Last block first: what is forgotten first is then the end of a prefix, never its beginning.
        for block in reversed(blocks):
            known[block] = None
            known.move_to_end(block)
        while len(known) > self._blocks_remembered:
            known.popitem(last=False)
