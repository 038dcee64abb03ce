"""The CUDA backend's operations on rows against the reference in float64."""

import dataclasses
import zlib
from typing import Any

import numpy as np
import pytest

from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.interface import WeightMode
from kvrelay_kernels.quant.weights import quantize_weight
from kvrelay_kernels.reference.backend import ReferenceBackend
from model_runtime.steps import sequence_steps
from tests.gpu.poisoned import UNIT, PoisonedCudaBackend, error, rounded, to_device, to_host

REFERENCE: Any = ReferenceBackend()
ROWS = [1, 3, 130]
WIDTHS = [64, 576, 640, 4096]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Other numbers for each test."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_norms(
    cupy: Any,
    backend: PoisonedCudaBackend,
    element: Element16,
    rng: np.random.Generator,
    rows: int,
    width: int,
) -> None:
    x, y = (rounded(3 * rng.standard_normal((rows, width)), element) for _ in range(2))
    weight = rng.uniform(0.5, 1.5, width).astype(np.float32)
    there = backend.load_array(weight)
    normed = backend.rms_norm(to_device(x, element), there, 1e-5)
    assert error(to_host(normed, element), REFERENCE.rms_norm(x, weight, 1e-5)) < UNIT[element]
    residual = rng.standard_normal((rows, width)).astype(np.float32)
    normed = backend.rms_norm(cupy.asarray(residual), there, 1e-5)
    assert error(to_host(normed, element), REFERENCE.rms_norm(residual, weight, 1e-5)) < UNIT[element]
    total, normed = backend.add_rms_norm(cupy.asarray(residual), to_device(y, element), there, 1e-5)
    assert np.array_equal(to_host(total, element), residual + y)
    assert error(to_host(normed, element), REFERENCE.rms_norm(residual + y, weight, 1e-5)) < UNIT[element]


@pytest.mark.parametrize("mode", ["auto", "float", "int8", "int4", "fp8"])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "codes", "mixed"])
def test_products_rows_and_logits(
    backend: PoisonedCudaBackend, element: Element16, rng: np.random.Generator, mode: WeightMode, kind: str
) -> None:
    values = [rng.standard_normal((n, 192)).astype(np.float32) for n in (64, 24)]
    parts: list[Any] = list(values)
    if kind in ("float16", "bfloat16"):
        from tests.gpu.paged_cache import DTYPES

        parts = [part.astype(DTYPES[kind]) for part in values]
    elif kind != "float32":
        parts[0] = quantize_weight(values[0], 4, 64)
        parts[1] = quantize_weight(values[1], 8, 32) if kind == "codes" else values[1]
    bias = rng.standard_normal(88).astype(np.float32)
    linear = backend.load_linear(parts, mode, bias)
    wanted: Any = REFERENCE.load_linear(parts, mode, bias)
    x = rounded(rng.standard_normal((21, 192)), element)
    # Modes that round to codes keep scales and biases in float16, on both sides of a sum that cancels.
    tolerance = 2 * UNIT[element] if mode in ("auto", "float") else 2 * UNIT[element] + 2.0**-11
    assert (
        error(to_host(backend.linear(to_device(x, element), linear), element), REFERENCE.linear(x, wanted))
        < tolerance
    )
    ids = np.array([3, 87, 3, 0], np.int32)
    found = backend.embed(linear, ids, 2.5)
    assert found.dtype == np.float32
    assert error(to_host(found, element), REFERENCE.embed(wanted, ids, 2.5)) < tolerance
    head, wanted = backend.load_linear(parts, mode), REFERENCE.load_linear(parts, mode)
    for rows in (np.arange(21, dtype=np.int32), np.array([20, 0, 7], np.int32)):
        logits = backend.logits(to_device(x, element), head, rows)
        assert logits.dtype == np.float32
        assert error(logits, REFERENCE.logits(x, wanted, rows)) < tolerance


def test_ids_outside_the_table_are_refused(backend: PoisonedCudaBackend) -> None:
    table = backend.load_linear([np.ones((8, 64), np.float32)], "float")
    with pytest.raises(IndexError):
        backend.embed(table, np.array([8], np.int32), 1.0)


@pytest.mark.parametrize(("n", "k"), [(576, 576), (6144, 4096), (4096, 14336)])
def test_the_bits_of_a_row_do_not_depend_on_the_number_of_rows(
    cupy: Any, backend: PoisonedCudaBackend, element: Element16, rng: np.random.Generator, n: int, k: int
) -> None:
    linear = backend.load_linear([rng.standard_normal((n, k), np.float32) / np.float32(np.sqrt(k))], "float")
    x = to_device(rng.standard_normal((2048, k), np.float32), element)
    whole = backend.linear(x, linear)
    for start, count in ((0, 1), (5, 2), (100, 17), (640, 64), (64, 256), (7, 1000)):
        part = backend.linear(cupy.ascontiguousarray(x[start : start + count]), linear)
        assert bool((part == whole[start : start + count]).all()), f"{count} rows"


@pytest.mark.parametrize("mode", ["float", "int4"])
def test_prompts_and_other_rows_keep_their_bits_side_by_side(
    cupy: Any, backend: PoisonedCudaBackend, element: Element16, mode: WeightMode
) -> None:
    """In a step of both, each row is what it is in a step of its own kind, whatever its length."""
    rng = np.random.default_rng(4)
    linear = backend.load_linear([rng.standard_normal((640, 512)).astype(np.float32)], mode)
    x = to_device(rng.standard_normal((113, 512)), element)
    counts, read = [100, 1, 1, 1, 5, 1, 4], np.array([True, False, False, True, True, False, True])
    mixed, _ = sequence_steps(counts, [0] * 7)
    found = backend.linear(x, linear, dataclasses.replace(mixed, read=read))
    singles = cupy.ascontiguousarray(x[[100, 101, 108]])
    apart = backend.linear(singles, linear, sequence_steps([1] * 3, [0] * 3)[0])
    assert bool((found[[100, 101, 108]] == apart).all())
    whole = backend.linear(x, linear, sequence_steps([113], [0])[0])
    prompts = [*range(100), *range(102, 108), *range(109, 113)]
    assert bool((found[prompts] == whole[prompts]).all())
