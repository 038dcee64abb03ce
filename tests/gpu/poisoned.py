"""The CUDA backend whose outputs are NaN until a kernel writes them, and arrays in its types."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.backend import CudaBackend
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.plans import PlanStore
from tests.gpu.paged_cache import DTYPES

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half a unit in the last place of 1."""


class PoisonedCudaBackend(CudaBackend):
    """What a kernel leaves unwritten is NaN, not luck."""

    def _blank(self, rows: int, width: int, kind: Any = np.uint16) -> Any:
        out = super()._blank(rows, width, kind)
        out.data.memset_async(0xFF, out.nbytes, self.stream)
        return out


def poisoned(element: Element16) -> PoisonedCudaBackend:
    """A backend that keeps no plans on disk."""
    return PoisonedCudaBackend(element=element, plans=PlanStore())


def rounded(values: NDArray[Any], element: str) -> NDArray[np.float32]:
    """The values as the element type has them."""
    return values.astype(DTYPES[element]).astype(np.float32)


def to_device(values: NDArray[Any], element: str) -> Any:
    """16-bit elements on the device, as uint16."""
    import cupy  # pyright: ignore[reportMissingImports]

    return cupy.asarray(values.astype(DTYPES[element]).view(np.uint16))


def to_host(array: Any, element: str) -> NDArray[np.float32]:
    """An activation as float32: 16-bit elements, or the residual stream."""
    found = array.get()
    return found if found.dtype == np.float32 else found.view(DTYPES[element]).astype(np.float32)


def product_of(product: Any, x: Any, weight: Any, kind: Any = np.uint16, bias: Any = None) -> Any:
    """`x @ weight.T (+ bias)` by a kernel's launcher, as uint16 or float32, poisoned before."""
    import cupy  # pyright: ignore[reportMissingImports]

    out = cupy.full((len(x), weight.shape[0]), np.nan if kind == np.float32 else 0xFFFF, kind)
    product(x, weight, bias, out)
    return out


def error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Relative error in the Frobenius norm; infinite where something is not finite."""
    assert found.shape == wanted.shape
    size = float(np.linalg.norm(found.astype(np.float64) - wanted) / max(np.linalg.norm(wanted), 1e-30))
    return size if np.isfinite(size) else float("inf")
