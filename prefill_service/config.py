"""Settings of a prefill worker."""

from dataclasses import dataclass
from pathlib import Path

from kvrelay_kernels.interface import WeightMode


@dataclass(frozen=True)
class PrefillConfig:
    """Everything a prefill worker is told; the control plane composes it."""

    worker_id: str
    model: str
    """A path, known name or repo id, as `model_runtime.catalog.resolve` takes it."""
    host: str = "127.0.0.1"
    """Address that the worker binds and that others reach it at."""
    backend: str = "cpu"
    threads: int = 2
    weights: WeightMode = "auto"
    kv_format: str = "int8"
    chunk_tokens: int = 512
    """Rows of one step, over all prompts together."""
    max_running: int = 8
    """Prompts that share steps."""
    max_waiting: int = 256
    """Prompts that wait beyond those; past it they are refused."""
    cache_tokens: int = 32768
    """Capacity of the arena, prompts in flight and cached prefixes together."""
    plan_cache: Path | None = None
    """Folder of compiled plans, which the workers of a machine share; None: `~/.cache/kvrelay/plans`."""
    store: str | None = None
    """URI of a Redis-protocol server whose block store shares prefixes between workers; None: no sharing."""
