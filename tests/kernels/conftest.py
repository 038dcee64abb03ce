"""What the tests of kernels share."""

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cpu.backend import CpuBackend
from kvrelay_kernels.reference.backend import ReferenceBackend


class PoisonedBackend(CpuBackend):
    """What a kernel leaves unwritten in its output is NaN, not luck."""

    def _blank(self, rows: int, width: int) -> NDArray[np.float32]:
        return np.full((rows, width), np.nan, np.float32)


@pytest.fixture
def cpu() -> CpuBackend:
    """The backend on two threads."""
    return PoisonedBackend(threads=2)


@pytest.fixture
def reference() -> ReferenceBackend:
    """The judge."""
    return ReferenceBackend()
