"""GPU tests run where CuPy sees a device (`pytest tests/gpu`); elsewhere they are skipped."""

from pathlib import Path
from typing import Any

import pytest

from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.module import KernelCache
from tests.gpu.poisoned import PoisonedCudaBackend, poisoned


@pytest.fixture(scope="session")
def cupy() -> Any:
    """CuPy, if it is installed and has a device."""
    library = pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
    try:
        library.cuda.runtime.getDeviceCount()
    except library.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    return library


@pytest.fixture(scope="session")
def kernels(cupy: Any, tmp_path_factory: pytest.TempPathFactory) -> KernelCache:
    """Compiled kernels of this test session."""
    return KernelCache(Path(tmp_path_factory.mktemp("cubins")))


@pytest.fixture(params=["float16", "bfloat16"])
def element(request: pytest.FixtureRequest) -> Element16:
    """Both element types."""
    return request.param


@pytest.fixture
def backend(cupy: Any, element: Element16) -> PoisonedCudaBackend:
    """A backend of that type."""
    return poisoned(element)
