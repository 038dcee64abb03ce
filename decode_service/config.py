"""Settings of a decode worker."""

from dataclasses import dataclass

from model_runtime.options import DecoderOptions


@dataclass(frozen=True)
class DecodeConfig:
    """Everything a decode worker is told; the control plane composes it."""

    worker_id: str
    decoder: DecoderOptions
    host: str = "127.0.0.1"
    """Address that the worker binds and that others reach it at."""
    slots: int = 16
    """Sequences that share steps."""
    max_waiting: int = 256
    """Requests that wait for a slot; past it they are refused."""
    cache_tokens: int = 65536
    """Capacity of the arena."""
    default_max_tokens: int = 2048
    """Bound on an answer where the request names none."""
    stream_seconds: float = 0.02
    """Tokens that a sequence draws within this time of a message go into the next one, together."""
    lease_seconds: float = 120.0
    """Time that a reserved slot waits for its blocks, from the last sign of life."""
    transport: str = "grpc"
    """`grpc`, or the URI of a Redis-protocol server through which blocks come."""
