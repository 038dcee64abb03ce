"""What a decode worker counts."""

from dataclasses import dataclass, field

from model_runtime.meter import Meter


@dataclass
class DecodeMetrics:
    """Counters since the start; written by the engine's thread alone."""

    requests: int = 0
    tokens: Meter = field(default_factory=Meter)
    """Tokens that this worker drew."""
    blocks_moved: int = 0
    bytes_moved: int = 0
