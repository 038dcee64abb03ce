"""Settings of a prefill worker."""

from dataclasses import dataclass

from model_runtime.options import DecoderOptions


@dataclass(frozen=True)
class PrefillConfig:
    """Everything a prefill worker is told; the control plane composes it."""

    worker_id: str
    decoder: DecoderOptions
    host: str = "127.0.0.1"
    """Address that the worker binds and that others reach it at."""
    chunk_tokens: int | None = None
    """Rows of one step, over all prompts together; None: as many as fill the backend's device."""
    max_running: int = 8
    """Prompts that share steps."""
    max_waiting: int = 256
    """Prompts that wait beyond those; past it they are refused."""
    cache_tokens: int = 32768
    """Capacity of the arena, prompts in flight and cached prefixes together."""
    store: str | None = None
    """URI of a Redis-protocol server whose block store shares prefixes between workers; None: no sharing."""
