"""What a worker of either pool is told about its model."""

from dataclasses import dataclass
from pathlib import Path

from kvrelay_kernels.interface import WeightMode
from kvrelay_kernels.quant.formats import Element


@dataclass(frozen=True)
class DecoderOptions:
    """Which model to open, on what, and in which format its cache is kept."""

    model: str
    """A path, known name or repo id, as `model_runtime.catalog.resolve` takes it."""
    backend: str = "cpu"
    element: Element | None = None
    """What activations and an unquantized cache hold; None: on `cuda` the model's 16-bit type
    (`ModelConfig.element`), elsewhere the backend's own."""
    threads: int = 2
    weights: WeightMode = "auto"
    kv_format: str = "int8"
    plan_cache: Path | None = None
    """Folder of compiled plans, which the workers of a machine share; None: `~/.cache/kvrelay/plans`."""
    plan_server: str | None = None
    """URI of a Redis-protocol server through which all machines share them; None: none does."""
