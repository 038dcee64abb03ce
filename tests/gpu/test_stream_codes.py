"""Products that stream codes, at the shapes of real models: accuracy, bits, and capture."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cuda.coded_matrix import BIAS_UNIT, CodedMatrix
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.device import find_gpu
from kvrelay_kernels.cuda.module import KernelCache, device_arch
from kvrelay_kernels.cuda.stream_codes import StreamCodes
from kvrelay_kernels.cuda.stream_rows import ARCHITECTURE
from tests.gpu.coded_weights import check_chain, load, values_of
from tests.gpu.paged_cache import DTYPES
from tests.gpu.poisoned import UNIT, PoisonedCudaBackend, error, product_of, to_device, to_host
from tests.kernels.coded_cases import E4M3_UNITS

SHAPES = [(6144, 4096), (4096, 14336), (9728, 2560), (576, 1536)]
WEIGHTS = ["int4", "int8", "int8-g16", "fp8", "fp8-blocks"]


@pytest.fixture
def streams(cupy: Any, element: Element16, kernels: KernelCache) -> StreamCodes:
    """The kernels alone."""
    if device_arch() != ARCHITECTURE:
        pytest.skip(f"runs on {ARCHITECTURE} alone")
    return StreamCodes(element, kernels, find_gpu().processors)


def halves(values: NDArray[np.float64], weight: CodedMatrix) -> NDArray[np.float64]:
    """Rounded as the kernels do it, unless scales are left to the sums."""
    if weight.form.row_scaled:
        return values
    one = weight.unit * (E4M3_UNITS if weight.floats else BIAS_UNIT)
    return (values / one).astype(np.float16).astype(np.float64) * one


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_real_shapes(
    cupy: Any,
    backend: PoisonedCudaBackend,
    streams: StreamCodes,
    element: Element16,
    name: str,
    shape: tuple[int, int],
) -> None:
    """Against float64, for every number of columns; a row's bits are the same in each, and each time."""
    weight = load(backend, name, *shape)
    # Scales that float16 does not have are rounded to it; with others, only sums are not exact.
    bound = 2.0**-14 if weight.factors.dtype == np.float16 or weight.form.row_scaled else 2.0**-10
    values = halves(values_of(backend, weight, element), weight)
    x = np.random.default_rng(1).standard_normal((70, shape[1])).astype(DTYPES[element])
    bias = to_device(np.random.default_rng(2).standard_normal(shape[0]), element)
    there, wanted = to_device(x, element), x.astype(np.float64) @ values.T
    assert error(product_of(streams, there, weight, np.float32).get(), wanted) < bound
    whole = product_of(streams, there, weight, bias=bias)
    shifted = wanted + to_host(bias, element).astype(np.float64)
    assert error(to_host(whole, element), shifted) < UNIT[element] + bound
    for start, count in ((0, 1), (3, 8), (5, 9), (10, 17), (1, 33), (6, 64), (0, 70)):
        part = cupy.ascontiguousarray(there[start : start + count])
        same = product_of(streams, part, weight, bias=bias)
        assert bool((same == whole[start : start + count]).all()), f"{count} rows"


def test_rows_of_every_size(
    cupy: Any, backend: PoisonedCudaBackend, streams: StreamCodes, element: Element16
) -> None:
    """bfloat16 far outside of what halves have, beside rows with an infinity."""
    if element == "float16":
        pytest.skip("halves are taken as they are")
    weight = load(backend, "int4", 4096, 4096)
    values = halves(values_of(backend, weight, element), weight)
    x = np.random.default_rng(3).standard_normal((9, 4096))
    x *= 2.0 ** np.array([0, 20, -20, 100, -40, 15, -8, 5, 0])[:, None]
    x[7] *= 2.0 ** np.repeat(np.arange(64) % 7 * 8 - 24, 64)
    x[8, 77] = np.inf
    x = x.astype(DTYPES[element])
    found = product_of(streams, to_device(x, element), weight, np.float32).get()
    for row in range(8):
        wanted = x[row : row + 1].astype(np.float64) @ values.T
        assert error(found[row : row + 1], wanted) < 2.0**-14, f"row {row}"
    assert not np.isfinite(found[8]).any()


@pytest.mark.parametrize("rows", [8, 24])
@pytest.mark.parametrize("name", WEIGHTS)
def test_inside_a_graph(
    backend: PoisonedCudaBackend, streams: StreamCodes, element: Element16, name: str, rows: int
) -> None:
    check_chain(streams, load(backend, name, 2560, 2560), rows, element)
