"""What a prefill worker counts."""

from dataclasses import dataclass, field

from model_runtime.meter import Meter


@dataclass
class PrefillMetrics:
    """Counters since the start; written by the engine's thread alone."""

    requests: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose blocks were found, not computed."""
    computed: Meter = field(default_factory=Meter)
    """Prompt tokens that went through the model."""
    blocks_moved: int = 0
    bytes_moved: int = 0
