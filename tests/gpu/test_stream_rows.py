"""Products that stream 16-bit weights, at the shapes of real models: accuracy, bits, routes and capture."""

from typing import Any

import numpy as np
import pytest

from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.device import find_gpu
from kvrelay_kernels.cuda.module import KernelCache, device_arch
from kvrelay_kernels.cuda.stream_rows import ARCHITECTURE, MOST_ROWS, StreamRows
from tests.gpu.paged_cache import DTYPES
from tests.gpu.poisoned import UNIT, error, product_of, to_device, to_host

SHAPES = [(6144, 4096), (4096, 14336), (9728, 2560), (577, 1544), (40, 64)]
COUNTS = (1, 2, 8, 9, 16, 17, 33, 64, MOST_ROWS + 6)


@pytest.fixture
def streams(cupy: Any, element: Element16, kernels: KernelCache) -> StreamRows:
    """The kernels alone."""
    if device_arch() != ARCHITECTURE:
        pytest.skip(f"runs on {ARCHITECTURE} alone")
    return StreamRows(element, kernels, find_gpu().processors)


def weight_of(n: int, k: int, element: str) -> Any:
    """Of variance 1 / k, on the device."""
    values = np.random.default_rng(n + k).standard_normal((n, k), np.float32) / np.float32(np.sqrt(k))
    return to_device(values, element)


@pytest.mark.parametrize("shape", SHAPES)
def test_real_shapes(cupy: Any, streams: StreamRows, element: Element16, shape: tuple[int, int]) -> None:
    """Against float64, for every number of columns; a row's bits are the same in each, and each time."""
    weight = weight_of(*shape, element)
    values = to_host(weight, element).astype(np.float64)
    x = np.random.default_rng(1).standard_normal((MOST_ROWS + 6, shape[1])).astype(DTYPES[element])
    bias = np.random.default_rng(2).standard_normal(shape[0]).astype(DTYPES[element])
    there, wanted = to_device(x, element), x.astype(np.float64) @ values.T
    assert error(product_of(streams, there, weight, np.float32).get(), wanted) < 2.0**-14
    whole = product_of(streams, there, weight, bias=to_device(bias, element))
    assert error(to_host(whole, element), wanted + bias.astype(np.float64)) < UNIT[element]
    for count in COUNTS:
        start = (len(x) - count) // 2
        part = cupy.ascontiguousarray(there[start : start + count])
        same = product_of(streams, part, weight, bias=to_device(bias, element))
        assert bool((same == whole[start : start + count]).all()), f"{count} rows"


def test_inside_a_graph(cupy: Any, streams: StreamRows, element: Element16) -> None:
    """A chain of products, each of which begins before its producer has ended."""
    first, second = weight_of(9728, 2560, element), weight_of(2560, 9728, element)
    rng = np.random.default_rng(3)
    x = to_device(rng.standard_normal((33, 2560)), element)
    middle, out = cupy.zeros((33, 9728), np.uint16), cupy.zeros((33, 2560), np.uint16)

    def chain() -> None:
        for _ in range(3):
            streams(x, first, None, middle)
            streams(middle, second, None, out)

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        chain()
        stream.synchronize()
        stream.begin_capture()
        chain()
        graph = stream.end_capture()
        for _ in range(20):
            x[...] = to_device(rng.standard_normal((33, 2560)), element)
            for array in (middle, out):
                array.data.memset_async(0xFF, array.nbytes, stream)
            graph.launch(stream)
            stream.synchronize()
            wanted = product_of(streams, x, first)
            assert bool((middle == wanted).all())
            assert bool((out == product_of(streams, wanted, second)).all())
