"""What the gateway counts: for the status call as plain numbers, for Prometheus as text."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FIRST_TOKEN_BUCKETS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
INTER_TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class GatewayMetrics:
    """One gateway's counters, in a registry of their own; seconds and tokens."""

    def __init__(self) -> None:
        """Start all at zero."""
        self.registry = CollectorRegistry()
        self.running = Gauge(
            "kvrelay_gateway_running", "Requests taken in and not ended", registry=self.registry
        )
        self.queued = Gauge("kvrelay_gateway_queued", "Requests waiting for a worker", registry=self.registry)
        self.requests = Counter(
            "kvrelay_gateway_requests",
            "Requests ended, by finish reason or leaf of the error tree",
            ["outcome"],
            registry=self.registry,
        )
        self.migrations = Counter(
            "kvrelay_gateway_migrations",
            "Times a request went on at other workers after a fault",
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "kvrelay_gateway_prompt_tokens", "Prompt tokens of answered requests", registry=self.registry
        )
        self.completion_tokens = Counter(
            "kvrelay_gateway_completion_tokens", "Tokens sent to clients", registry=self.registry
        )
        self.queue_seconds = Histogram(
            "kvrelay_gateway_queue_seconds",
            "Wait for workers, of answered requests",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.first_token_seconds = Histogram(
            "kvrelay_gateway_first_token_seconds",
            "From the request to its first token",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.inter_token_seconds = Histogram(
            "kvrelay_gateway_inter_token_seconds",
            "Between two token messages of a request",
            buckets=INTER_TOKEN_BUCKETS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
