"""Weights as the backend loads them, and what they stand for."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.coded_matrix import CodedMatrix
from kvrelay_kernels.interface import WeightMode
from kvrelay_kernels.quant.weights import quantize_weight
from tests.gpu.poisoned import PoisonedCudaBackend, to_host


def load(backend: PoisonedCudaBackend, name: str, n: int, k: int) -> Any:
    """A weight of variance 1 / k in a form."""
    values = np.random.default_rng(n + k).standard_normal((n, k), np.float32) / np.float32(np.sqrt(k))
    mode: WeightMode = "auto"
    if name == "int8-g16":
        return backend.load_linear([quantize_weight(values, 6, 16)], mode).weight
    modes: dict[str, WeightMode] = {"int4": "int4", "int8": "int8", "16": "float"}
    return backend.load_linear([values], modes[name]).weight


def values_of(backend: PoisonedCudaBackend, weight: Any, element: str) -> NDArray[np.float64]:
    """What a weight stands for, in elements: one row after the other, by `embed`."""
    n, k = weight.shape
    if not isinstance(weight, CodedMatrix):
        return to_host(weight, element).astype(np.float64)
    import cupy  # pyright: ignore[reportMissingImports]

    out = cupy.empty((n, k), np.float32)
    backend._rows.embed(weight, cupy.arange(n, dtype=np.int32), 1.0, out)  # pyright: ignore[reportPrivateUsage]
    return out.get().astype(np.float64)
