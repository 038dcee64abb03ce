"""Which backend `auto` means on a machine: the fastest kind that it can run."""

import sys

from kvrelay.errors import BadSetup
from kvrelay_kernels.errors import BackendUnavailable
from kvrelay_kernels.registry import BackendName, load_backend

PREFERENCE: tuple[BackendName, ...] = ("cuda", "mlx", "cpu")
"""The first usable one is taken; `reference` is for tests."""


def usual(name: BackendName) -> bool:
    """Whether `auto` considers a backend here: MLX for Linux computes on the CPU, slower than ours."""
    return name != "mlx" or sys.platform == "darwin"


def choose(name: str) -> str:
    """The backend that a setting means on this machine.

    Raises:
        BadSetup: none is usable.
    """
    if name != "auto":
        return name
    faults: list[str] = []
    for candidate in filter(usual, PREFERENCE):
        try:
            load_backend(candidate, threads=1)
        except BackendUnavailable as error:
            faults.append(str(error))
        else:
            return candidate
    raise BadSetup(f"no backend is usable: {'; '.join(faults)}")
