"""Settings of the gateway."""

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True)
class GatewayConfig:
    """Everything the gateway is told; the control plane composes it."""

    host: str = "127.0.0.1"
    port: int = 0
    """Port of the gRPC services; 0 takes a free one, which `Gateway.port` names."""
    http_port: int | None = None
    """Port of the OpenAI-compatible HTTP, 0 for a free one; None: no HTTP."""
    max_queued: int = 256
    """Requests that wait for a worker; past it they are refused with QueueFull."""
    max_prompt_bytes: int = 4 * MIB
    """Largest prompt, as text, that is tokenized at all; past it PromptTooLong."""
    retries: int = 3
    """Times that a request goes on at another worker after a fault; past it NoWorker."""
    worker_wait_seconds: float = 30.0
    """Time that a request waits while a pool it needs has no ready worker; past it NoWorker."""
    poll_seconds: float = 1.0
    """Time between two status calls to a worker."""
    lost_seconds: float = 10.0
    """Time without an answer to a status call after which a worker's open streams go on elsewhere."""
    wait_seconds: float = 600.0
    """Time that a worker may take over a slot, or over a prompt's first token, its own queue included."""
    stall_seconds: float = 60.0
    """Time without an event on a joined decode stream after which that stream is given up."""
    affinity_blocks: int = 512
    """Prefix blocks of 64 tokens remembered for each prefill worker, about what its cache holds."""
    shutdown_seconds: float = 2.0
    """Time that running requests have left once the gateway is told to stop."""
