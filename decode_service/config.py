"""Settings of a decode worker."""

from dataclasses import dataclass
from pathlib import Path

from kvrelay_kernels.interface import WeightMode


@dataclass(frozen=True)
class DecodeConfig:
    """Everything a decode worker is told; the control plane composes it."""

    worker_id: str
    model: str
    """A path, known name or repo id, as `model_runtime.catalog.resolve` takes it."""
    host: str = "127.0.0.1"
    """Address that the worker binds and that others reach it at."""
    backend: str = "cpu"
    threads: int = 2
    weights: WeightMode = "auto"
    kv_format: str = "int8"
    slots: int = 16
    """Sequences that share steps."""
    max_waiting: int = 256
    """Requests that wait for a slot; past it they are refused."""
    cache_tokens: int = 65536
    """Capacity of the arena."""
    plan_cache: Path | None = None
    """Folder of compiled plans, which the workers of a machine share; None: `~/.cache/kvrelay/plans`."""
    default_max_tokens: int = 2048
    """Bound on an answer where the request names none."""
    stream_seconds: float = 0.02
    """Tokens that a sequence draws within this time of a message go into the next one, together."""
    lease_seconds: float = 120.0
    """Time that a reserved slot waits for its blocks, from the last sign of life."""
    transport: str = "grpc"
    """`grpc`, or the URI of a Redis-protocol server through which blocks come."""
