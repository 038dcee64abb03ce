"""What a cache of plans did, for metrics."""

from collections import Counter
from dataclasses import dataclass, field, fields, replace

LIVE = "live"
"""The tier of plans that are loaded in this process."""


@dataclass
class PlanCounts:
    """Counters since the start; a sum adds up those of several caches."""

    hits: Counter[str] = field(default_factory=Counter[str])
    """Plans found, by tier: `LIVE`, then the names of the store's tiers."""
    misses: int = 0
    """Plans found in no tier, or in none that could be trusted."""
    shared: int = 0
    """Calls that waited for another thread's search or build, and got its plan."""
    builds: int = 0
    """Builds that succeeded."""
    failures: int = 0
    """Builds that raised."""
    rejected: int = 0
    """Stored plans that were cut short, changed, of another version or key, or that did not load."""
    rebuilt: int = 0
    """Builds in place of rejected plans."""
    evictions: int = 0
    """Plans that the cache let go of to stay within its capacity."""
    build_seconds: float = 0.0
    """Time spent building, failed builds included."""
    load_seconds: float = 0.0
    """Time spent looking for stored plans and loading them."""

    def copy(self) -> "PlanCounts":
        """The counters as they are now."""
        return replace(self, hits=Counter(self.hits))

    def __add__(self, other: "PlanCounts") -> "PlanCounts":
        numbers = [one.name for one in fields(self) if one.name != "hits"]
        sums = {name: getattr(self, name) + getattr(other, name) for name in numbers}
        return PlanCounts(Counter(self.hits) + Counter(other.hits), **sums)
