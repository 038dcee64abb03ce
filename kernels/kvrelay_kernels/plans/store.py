"""Where serialized plans are kept: tiers of blob stores, the fastest first."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvrelay_kernels.plans.entry import pack, unpack
from kvrelay_kernels.plans.folder import FolderBlobs, FolderLocks
from kvrelay_kernels.plans.key import GraphKey


class Blobs(Protocol):
    """Named blobs that may be lost at any time; `kv_transfer.blob_store` has more of them.

    A store that is gone, full or read-only forgets and says nothing: it never raises.
    """

    def get(self, name: str) -> bytes | None:
        """The blob; None where there is none."""
        ...

    def put(self, name: str, blob: bytes) -> None:
        """Keep a blob under a name, in place of the one before."""
        ...


class Locks(Protocol):
    """Makes one process build while others wait."""

    def hold(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock of a name as long as the context lasts."""
        ...


@dataclass(frozen=True)
class Tier:
    """One store, under the name that counters give it."""

    name: str
    blobs: Blobs


@dataclass(frozen=True)
class Stored:
    """What a tier holds under a key."""

    tier: str
    place: int
    """Tiers that are faster."""
    plan: bytes | None
    """None: what is there cannot be trusted."""


class PlanStore:
    """Serialized plans by key, for all caches of a process; safe to call from several threads."""

    def __init__(self, tiers: Sequence[Tier] = (), locks: Locks | None = None) -> None:
        """`tiers` come fastest first; without `locks`, processes that want one plan each build it."""
        self._tiers = tuple(tiers)
        self._locks = locks

    @property
    def tiers(self) -> tuple[str, ...]:
        """Names of the tiers, the fastest first."""
        return tuple(tier.name for tier in self._tiers)

    def read(self, key: GraphKey) -> Iterator[Stored]:
        """What is kept under a key, the fastest tier first; tiers that hold nothing are left out."""
        for place, tier in enumerate(self._tiers):
            entry = tier.blobs.get(key.name)
            if entry is not None:
                yield Stored(tier.name, place, unpack(key, entry))

    def write(self, key: GraphKey, plan: bytes, tiers: int | None = None) -> None:
        """Keep a plan in all tiers, or in the fastest few."""
        entry = pack(key, plan) if self._tiers else b""
        for tier in self._tiers[:tiers]:
            tier.blobs.put(key.name, entry)

    def building(self, key: GraphKey) -> AbstractContextManager[None]:
        """Hold while a plan is looked for a second time and built, so that other processes find it."""
        return nullcontext() if self._locks is None else self._locks.hold(key.name)


def default_plan_folder() -> Path:
    """Where plans are kept unless the process's config says otherwise."""
    return Path.home() / ".cache" / "kvrelay" / "plans"


def open_plans(folder: Path | None, shared: Sequence[Tier] = ()) -> PlanStore:
    """The store of a worker: a folder that all processes of a machine may share, then what the fleet shares.

    Args:
        folder: None: nothing is kept on this machine's disk.
        shared: slower tiers, such as `Tier("redis", RedisBlobs(client))`.
    """
    if folder is None:
        return PlanStore(shared)
    return PlanStore((Tier("disk", FolderBlobs(folder)), *shared), FolderLocks(folder))
