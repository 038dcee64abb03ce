"""Gated products, at the shapes of real models: what they make of the sums that `linear` has too."""

import dataclasses
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.gemm import CudaLinear, Products
from kvrelay_kernels.interface import Activation, WeightMode
from kvrelay_kernels.reference.backend import ReferenceBackend
from model_runtime.steps import sequence_steps
from tests.gpu.poisoned import UNIT, PoisonedCudaBackend, to_device, to_host

REFERENCE: Any = ReferenceBackend()
COUNTS = (1, 3, 5, 17, 70, 130)
CASES: list[tuple[tuple[int, int], WeightMode]] = [
    ((14336, 4096), "float"),
    ((14336, 4096), "int4"),
    ((9728, 2560), "int8"),
    ((1536, 576), "float"),
    ((24, 64), "int4"),
]
"""Width and columns of the gate, and its mode."""
ACTIVATIONS: dict[str, Activation] = {"float16": "silu", "bfloat16": "gelu_tanh"}


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Other numbers for each test."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


def gate_of(
    backend: PoisonedCudaBackend, width: int, k: int, mode: WeightMode
) -> tuple[CudaLinear, CudaLinear]:
    """A gated matrix, and the same rows below each other; of variance 1 / k."""
    import cupy  # pyright: ignore[reportMissingImports]

    random = cupy.random.Generator(cupy.random.XORWOW(width + k))
    gate, up = (random.standard_normal((width, k), np.float32) * np.float32(k**-0.5) for _ in range(2))
    return backend.load_gated(gate, up, mode), backend.load_linear([gate, up], mode)


def check(found: NDArray[Any], sums: NDArray[Any], activation: Activation, element: str) -> None:
    """Each element, which has been rounded once, and in float16 may be below the normal numbers."""
    wanted = REFERENCE.gate(sums.astype(np.float64), activation)
    assert (np.abs(found - wanted) <= 1.5 * UNIT[element] * np.abs(wanted) + 2.0**-24).all()


@pytest.mark.parametrize(("shape", "mode"), CASES)
def test_rows_of_decode(
    cupy: Any,
    backend: PoisonedCudaBackend,
    element: Element16,
    rng: np.random.Generator,
    shape: tuple[int, int],
    mode: WeightMode,
) -> None:
    """For every number of rows, and with NaN in the last: what the float32 sums give, rounded once."""
    gated, plain = gate_of(backend, *shape, mode)
    x = rng.standard_normal((max(COUNTS), shape[1]))
    for count in COUNTS:
        batch, _ = sequence_steps([1] * count, [0] * count)
        there = to_device(x[:count], element)
        sums = cupy.full((count, plain.n), np.nan, np.float32)
        backend._products(there, plain, sums, prompts=False)  # pyright: ignore[reportPrivateUsage]
        found = backend.gated_linear(there, gated, ACTIVATIONS[element], batch)
        check(to_host(found, element), sums.get(), ACTIVATIONS[element], element)
        there[count - 1, 5] = 0xFFFF
        spoilt = backend.gated_linear(there, gated, ACTIVATIONS[element], batch)
        assert bool((spoilt[: count - 1] == found[: count - 1]).all())
        assert np.isnan(to_host(spoilt[count - 1], element)).all()


@pytest.mark.parametrize(("shape", "mode"), CASES)
def test_prompts(
    backend: PoisonedCudaBackend,
    element: Element16,
    rng: np.random.Generator,
    shape: tuple[int, int],
    mode: WeightMode,
) -> None:
    """What products that were rounded give."""
    gated, plain = gate_of(backend, *shape, mode)
    there = to_device(rng.standard_normal((77, shape[1])), element)
    batch, _ = sequence_steps([77], [0])
    sums = to_host(backend.linear(there, plain, batch), element)
    found = backend.gated_linear(there, gated, ACTIVATIONS[element], batch)
    check(to_host(found, element), sums, ACTIVATIONS[element], element)


@pytest.mark.parametrize("mode", ["float", "int4"])
def test_where_products_do_not_gate(
    monkeypatch: pytest.MonkeyPatch,
    backend: PoisonedCudaBackend,
    element: Element16,
    rng: np.random.Generator,
    mode: WeightMode,
) -> None:
    """As on other architectures."""
    monkeypatch.setattr(Products, "gates", lambda *_: False)
    gated, plain = gate_of(backend, 1536, 576, mode)
    there, (batch, _) = to_device(rng.standard_normal((9, 576)), element), sequence_steps([1] * 9, [0] * 9)
    sums = to_host(backend.linear(there, plain, batch), element)
    found = backend.gated_linear(there, gated, ACTIVATIONS[element], batch)
    check(to_host(found, element), sums, ACTIVATIONS[element], element)


@pytest.mark.parametrize("mode", ["float", "int4"])
def test_prompts_and_other_rows_keep_their_bits_side_by_side(
    cupy: Any, backend: PoisonedCudaBackend, element: Element16, rng: np.random.Generator, mode: WeightMode
) -> None:
    gated, _ = gate_of(backend, 320, 512, mode)
    x = to_device(rng.standard_normal((107, 512)), element)
    mixed, _ = sequence_steps([100, 1, 1, 5], [0] * 4)
    mixed = dataclasses.replace(mixed, read=np.array([True, False, False, True]))
    found = backend.gated_linear(x, gated, "silu", mixed)
    singles = cupy.ascontiguousarray(x[100:102])
    apart = backend.gated_linear(singles, gated, "silu", sequence_steps([1] * 2, [0] * 2)[0])
    assert bool((found[100:102] == apart).all())
    whole = backend.gated_linear(x, gated, "silu", sequence_steps([107], [0])[0])
    prompts = [*range(100), *range(102, 107)]
    assert bool((found[prompts] == whole[prompts]).all())
