"""Which rows of which prompts the next prefill step computes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Prompt(Protocol):
    """What the scheduler needs to know of a prompt."""

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        ...


P = TypeVar("P", bound=Prompt)


@dataclass(frozen=True)
class Chunk(Generic[P]):
    """The next `tokens` tokens of a prompt."""

    prompt: P
    tokens: int


def schedule(running: Sequence[P], budget: int) -> list[Chunk[P]]:
    """Share a step of `budget` rows among prompts, given oldest first.

    The oldest prompt gets half of the rows, so that none starves; the rest goes to the prompts with the
    fewest tokens left, so that a short one never waits for a long one to end; what nobody else needs
    goes back to the oldest. Every row of the budget is used while there is work for it.
    """
    if not running:
        return []
    oldest, *younger = running
    shares = {id(oldest): min(oldest.remaining, max(1, budget // 2))}
    left = budget - shares[id(oldest)]
    for prompt in sorted(younger, key=lambda prompt: prompt.remaining):
        shares[id(prompt)] = min(prompt.remaining, left)
        left -= shares[id(prompt)]
    shares[id(oldest)] += min(oldest.remaining - shares[id(oldest)], left)
    return [Chunk(prompt, shares[id(prompt)]) for prompt in running if shares[id(prompt)]]
