"""What the tests of kernels share."""

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cpu.backend import CpuBackend
from kvrelay_kernels.cpu.recording import AtOnce
from kvrelay_kernels.reference.backend import ReferenceBackend


class Poisoned(AtOnce):
    """What a kernel leaves unwritten in its output is NaN, not luck."""

    def blank(self, rows: int, width: int) -> NDArray[np.float32]:
        """See `Sink`."""
        return np.full((rows, width), np.nan, np.float32)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> CpuBackend:
    """The backend on two threads."""
    monkeypatch.setattr("kvrelay_kernels.cpu.backend.AtOnce", Poisoned)
    return CpuBackend(threads=2)


@pytest.fixture
def reference() -> ReferenceBackend:
    """The judge."""
    return ReferenceBackend()
