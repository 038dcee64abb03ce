"""Weights as the backend loads them, what they stand for, and products with them in a graph."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.coded_matrix import CodedMatrix
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.interface import WeightMode
from kvrelay_kernels.quant import ScaledWeight
from kvrelay_kernels.quant.levels import E4M3_MAX, encode_e4m3
from kvrelay_kernels.quant.weights import quantize_weight
from tests.gpu.poisoned import PoisonedCudaBackend, product_of, to_device, to_host


def load(backend: PoisonedCudaBackend, name: str, n: int, k: int) -> Any:
    """A weight of variance 1 / k in a form."""
    values = np.random.default_rng(n + k).standard_normal((n, k), np.float32) / np.float32(np.sqrt(k))
    mode: WeightMode = "auto"
    if name == "int8-g16":
        return backend.load_linear([quantize_weight(values, 6, 16)], mode).weight
    if name == "fp8-blocks":
        return backend.load_linear([in_blocks(values)], mode).weight
    modes: dict[str, WeightMode] = {"int4": "int4", "int8": "int8", "fp8": "fp8", "16": "float"}
    return backend.load_linear([values], modes[name]).weight


def in_blocks(values: NDArray[np.float32]) -> ScaledWeight:
    """8-bit floats under a scale of every 128 x 128 values; the last blocks may be smaller."""
    n, k = values.shape
    tops = np.pad(np.abs(values), ((0, -n % 128), (0, -k % 128))).reshape(-(-n // 128), 128, -1, 128)
    scales = (tops.max((1, 3)) / np.float32(E4M3_MAX)).repeat(128, 0)[:n]
    spread = ScaledWeight(np.zeros((n, k), np.uint8), scales, 128).regroup(1).scales
    return ScaledWeight(encode_e4m3(values / spread), scales, 128)


def values_of(backend: PoisonedCudaBackend, weight: Any, element: str) -> NDArray[np.float64]:
    """What a weight stands for, in elements: one row after the other, by `embed`."""
    n, k = weight.shape
    if not isinstance(weight, CodedMatrix):
        return to_host(weight, element).astype(np.float64)
    import cupy  # pyright: ignore[reportMissingImports]

    out = cupy.empty((n, k), np.float32)
    backend._rows.embed(weight, cupy.asarray(np.arange(n, dtype=np.int32)), 1.0, out)  # pyright: ignore[reportPrivateUsage]
    return out.get().astype(np.float64)


def check_chain(product: Any, weight: Any, rows: int, element: Element16) -> None:
    """Three products behind each other in a graph, which may overlap: each reads what the one before wrote.

    `weight` is square; `product` is a kernel's launcher.
    """
    import cupy  # pyright: ignore[reportMissingImports]

    width, rng = weight.shape[1], np.random.default_rng(3)
    x = to_device(rng.standard_normal((rows, width)), element)
    outs = [cupy.zeros((rows, width), np.uint16) for _ in range(3)]

    def chain() -> None:
        for given, out in zip([x, *outs[:2]], outs, strict=True):
            product(given, weight, None, out)

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        chain()
        stream.synchronize()
        stream.begin_capture()
        chain()
        graph = stream.end_capture()
        for _ in range(20):
            x[...] = to_device(rng.standard_normal((rows, width)), element)
            for out in outs:
                out.data.memset_async(0xFF, out.nbytes, stream)
            graph.launch(stream)
            stream.synchronize()
            for given, out in zip([x, *outs[:2]], outs, strict=True):
                assert bool((out == product_of(product, given, weight)).all())
                stream.synchronize()
