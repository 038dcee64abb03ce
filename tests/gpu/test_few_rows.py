"""Products of few rows on the GPU at the shapes of real models: accuracy, bits, and capture."""

from typing import Any

import numpy as np
import pytest

from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.device import find_gpu
from kvrelay_kernels.cuda.few_rows import FewRows
from kvrelay_kernels.cuda.module import KernelCache
from kvrelay_kernels.interface import WeightMode
from kvrelay_kernels.quant.weights import as_codes, quantize_scaled
from model_runtime.steps import sequence_steps
from tests.gpu.coded_weights import load, values_of
from tests.gpu.paged_cache import DTYPES
from tests.gpu.poisoned import UNIT, PoisonedCudaBackend, error, product_of, to_device, to_host

SHAPES = [(6144, 4096), (4096, 14336), (9728, 2560), (576, 1536)]
WEIGHTS = ["int4", "int8", "int8-g16", "fp8", "fp8-blocks", "16"]
CODED: list[tuple[WeightMode, int]] = [("int4", 4), ("int8", 8)]


@pytest.fixture
def few(cupy: Any, element: Element16, kernels: KernelCache) -> FewRows:
    """The kernels alone, also for 16-bit weights."""
    return FewRows(element, kernels, find_gpu().processors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_real_shapes(
    cupy: Any,
    backend: PoisonedCudaBackend,
    few: FewRows,
    element: Element16,
    name: str,
    shape: tuple[int, int],
) -> None:
    """Against float64, for every tiling of rows; a row's bits are the same in each, and each time."""
    weight = load(backend, name, *shape)
    values = values_of(backend, weight, element)
    x = np.random.default_rng(1).standard_normal((70, shape[1])).astype(DTYPES[element])
    there = to_device(x, element)
    sums = product_of(few, there, weight, np.float32)
    assert error(sums.get(), x.astype(np.float64) @ values.T) < 2.0**-14
    whole = product_of(few, there, weight)
    assert error(to_host(whole, element), x.astype(np.float64) @ values.T) < UNIT[element]
    for start, count in ((0, 1), (3, 8), (5, 9), (10, 17), (1, 33), (6, 64), (0, 70)):
        part = cupy.ascontiguousarray(there[start : start + count])
        assert bool((product_of(few, part, weight) == whole[start : start + count]).all()), f"{count} rows"


def test_codes_take_no_more_memory_than_they_say(cupy: Any, backend: PoisonedCudaBackend) -> None:
    weight = load(backend, "int4", 4096, 4096)
    assert weight.factors.dtype == np.float16
    assert weight.nbytes == 4096 * 4096 * 5 // 8


def test_rounding_on_the_device_is_that_of_the_host(backend: PoisonedCudaBackend, element: Element16) -> None:
    values = np.random.default_rng(2).standard_normal((48, 192)).astype(np.float32)
    for kind in (np.float32, DTYPES["float16"], DTYPES["bfloat16"]):
        part = values.astype(kind)
        for mode, bits in CODED:
            weight = backend.load_linear([part], mode).weight
            wanted = as_codes(part, bits)
            same = backend.load_linear([wanted], "auto").weight
            assert np.array_equal(weight.codes.get(), same.codes.get())
            values = wanted.dequantize().astype(np.float64)
            biases = np.repeat(wanted.biases.astype(np.float64), wanted.group, axis=1)
            least = 2.0**-15 * wanted.scales.max()
            sizes = np.abs(values - biases) + np.abs(biases)  # scale and bias are rounded, each to 11 bits
            assert (np.abs(values_of(backend, weight, element) - values) <= 2.0**-11 * sizes + least).all()


def test_small_floats_are_rounded_on_the_device_as_on_the_host(
    backend: PoisonedCudaBackend, element: Element16
) -> None:
    """In rows of every size, one of them zeros."""
    values = np.random.default_rng(2).standard_normal((48, 192)).astype(np.float32)
    values *= np.exp2(np.arange(48, dtype=np.float32) / 4 - 6)[:, None]  # float16 has no more
    values[7] = 0
    for kind in (np.float32, DTYPES["float16"], DTYPES["bfloat16"]):
        part = values.astype(kind)
        weight = backend.load_linear([part], "fp8").weight
        wanted = quantize_scaled(part.astype(np.float32))
        same = backend.load_linear([wanted], "auto").weight
        assert np.array_equal(weight.codes.get(), same.codes.get())
        assert np.array_equal(weight.factors.get(), same.factors.get())
        assert weight.unit == same.unit
        assert np.array_equal(values_of(backend, weight, element), wanted.dequantize())
        plain = to_host(backend.load_linear([wanted], "float").weight, element)
        assert np.array_equal(plain, wanted.dequantize().astype(DTYPES[element]))


@pytest.mark.parametrize("rows", [1, 64, 65, 129, 300])
@pytest.mark.parametrize("mode", ["int4", "int8", "fp8"])
def test_products_of_codes_with_any_number_of_rows(
    cupy: Any, backend: PoisonedCudaBackend, element: Element16, mode: WeightMode, rows: int
) -> None:
    rng = np.random.default_rng(rows)
    parts = [rng.standard_normal((n, 512)).astype(np.float32) for n in (640, 96)]
    bias = rng.standard_normal(736).astype(np.float32)
    linear = backend.load_linear(parts, mode, bias)
    values = values_of(backend, linear.weight, element)
    x = rng.standard_normal((rows, 512)).astype(DTYPES[element])
    wanted = x.astype(np.float64) @ values.T
    batches = [sequence_steps([rows], [0])[0], sequence_steps([1] * rows, [0] * rows)[0], None]
    for batch in batches:
        found = to_host(backend.linear(to_device(x, element), linear, batch), element)
        assert error(found, wanted + bias) < 2 * UNIT[element]
    logits = backend.logits(
        to_device(x, element), backend.load_linear(parts, mode), np.arange(rows, dtype=np.int32)
    )
    assert error(logits, wanted) < UNIT["float16"]  # of the matrix, where it is rounded to halves


@pytest.mark.parametrize("name", WEIGHTS)
def test_inside_a_graph(
    cupy: Any, backend: PoisonedCudaBackend, few: FewRows, element: Element16, name: str
) -> None:
    weight = load(backend, name, 4096, 2560)
    rng = np.random.default_rng(3)
    x = to_device(rng.standard_normal((8, 2560)), element)
    out = cupy.zeros((8, 4096), np.uint16)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        few(x, weight, None, out)
        stream.synchronize()
        stream.begin_capture()
        few(x, weight, None, out)
        graph = stream.end_capture()
        for _ in range(3):
            x[...] = to_device(rng.standard_normal((8, 2560)), element)
            out.data.memset_async(0xFF, out.nbytes, stream)
            graph.launch(stream)
            stream.synchronize()
            assert bool((out == product_of(few, x, weight)).all())
