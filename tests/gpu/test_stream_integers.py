"""Products of few rows with codes by integers, at the shapes of real models: accuracy, bits, and capture."""

from typing import Any

import numpy as np
import pytest

from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.device import find_gpu
from kvrelay_kernels.cuda.module import KernelCache, device_arch
from kvrelay_kernels.cuda.stream_integers import StreamIntegers
from kvrelay_kernels.cuda.stream_rows import ARCHITECTURE
from tests.gpu.coded_weights import check_chain, load, values_of
from tests.gpu.paged_cache import DTYPES
from tests.gpu.poisoned import UNIT, PoisonedCudaBackend, error, product_of, to_device, to_host

SHAPES = [(6144, 4096), (4096, 14336), (9728, 2560), (576, 1536), (28672, 320)]
WEIGHTS = ["int4", "int8", "int8-g16"]
ROUNDED = 2.0**-14
"""Error of standard normal numbers, rounded to 16-bit integers with a step for 32 of them."""


@pytest.fixture
def streams(cupy: Any, element: Element16, kernels: KernelCache) -> StreamIntegers:
    """The kernels alone."""
    if device_arch() != ARCHITECTURE:
        pytest.skip(f"runs on {ARCHITECTURE} alone")
    return StreamIntegers(element, kernels, find_gpu().processors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_real_shapes(
    cupy: Any,
    backend: PoisonedCudaBackend,
    streams: StreamIntegers,
    element: Element16,
    name: str,
    shape: tuple[int, int],
) -> None:
    """Against float64; a row's bits are the same for every number of rows, and each time."""
    weight = load(backend, name, *shape)
    values = values_of(backend, weight, element)
    x = np.random.default_rng(1).standard_normal((4, shape[1])).astype(DTYPES[element])
    bias = to_device(np.random.default_rng(2).standard_normal(shape[0]), element)
    there, wanted = to_device(x, element), x.astype(np.float64) @ values.T
    assert error(product_of(streams, there, weight, np.float32).get(), wanted) < ROUNDED
    whole = product_of(streams, there, weight, bias=bias)
    shifted = wanted + to_host(bias, element).astype(np.float64)
    assert error(to_host(whole, element), shifted) < UNIT[element] + ROUNDED
    for start, count in ((0, 1), (3, 1), (1, 2), (1, 3), (0, 4)):
        part = cupy.ascontiguousarray(there[start : start + count])
        same = product_of(streams, part, weight, bias=bias)
        assert bool((same == whole[start : start + count]).all()), f"{count} rows"


def test_rows_of_every_size(
    cupy: Any, backend: PoisonedCudaBackend, streams: StreamIntegers, element: Element16
) -> None:
    """Numbers far from 1, beside a row with an infinity."""
    weight = load(backend, "int4", 4096, 4096)
    values = values_of(backend, weight, element)
    x = np.random.default_rng(3).standard_normal((4, 4096))
    x *= 2.0 ** np.array([0, 100, -60, 0] if element == "bfloat16" else [0, 5, -2, 0])[:, None]
    x[0] *= 2.0 ** np.repeat(np.arange(64) % 7 - 3, 64)
    x[3, 77] = np.inf
    x = x.astype(DTYPES[element])
    found = product_of(streams, to_device(x, element), weight, np.float32).get()
    for row in range(3):
        wanted = x[row : row + 1].astype(np.float64) @ values.T
        assert error(found[row : row + 1], wanted) < ROUNDED, f"row {row}"
    assert not np.isfinite(found[3]).any()


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("rows", [1, 3])
def test_inside_a_graph(
    backend: PoisonedCudaBackend, streams: StreamIntegers, element: Element16, name: str, rows: int
) -> None:
    check_chain(streams, load(backend, name, 2560, 2560), rows, element)
