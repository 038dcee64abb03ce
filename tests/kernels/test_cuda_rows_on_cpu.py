"""The CUDA kernels that work on rows, run on this processor, against the reference."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kvrelay_kernels.cuda.coded_matrix import gated_order
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.rows import RowKernels
from kvrelay_kernels.cuda.weights import convert_key
from kvrelay_kernels.interface import Activation
from kvrelay_kernels.quant.rotation import rotate
from kvrelay_kernels.quant.weights import quantize_weight
from kvrelay_kernels.reference.backend import ReferenceBackend
from tests.gpu.poisoned import UNIT, error
from tests.kernels.elements import elements, floats
from tests.kernels.host_kernels import COMPILER, HostKernels

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
REFERENCE: Any = ReferenceBackend()


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers ask the device for its architecture."""
    monkeypatch.setattr("kvrelay_kernels.cuda.rows.device_arch", lambda: "sm_90a")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels of this module, each compiled once."""
    return HostKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(params=["float16", "bfloat16"])
def element(request: pytest.FixtureRequest) -> Element16:
    """Both element types."""
    return request.param


@pytest.mark.parametrize("width", [64, 576, 4096])
def test_norms(kernels: Any, element: Element16, width: int) -> None:
    rows, rng = RowKernels(element, kernels), np.random.default_rng(width)
    x, y = (rng.standard_normal((3, width)).astype(np.float32) for _ in range(2))
    weight = rng.uniform(0.5, 1.5, width).astype(np.float32)
    there = elements(y, element)
    rounded = floats(there, element)
    out, total = np.full((3, width), 0xFFFF, np.uint16), np.full((3, width), np.nan, np.float32)
    rows.norm(x, weight, 1e-5, out, there, total)
    assert np.array_equal(total, x + rounded)
    assert error(floats(out, element), REFERENCE.rms_norm(x + rounded, weight, 1e-5)) < UNIT[element]
    out.fill(0xFFFF)
    rows.norm(there, weight, 1e-5, out)
    assert error(floats(out, element), REFERENCE.rms_norm(rounded, weight, 1e-5)) < UNIT[element]


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate(kernels: Any, element: Element16, activation: Activation) -> None:
    x = 4 * np.random.default_rng(1).standard_normal((3, 2 * 2056)).astype(np.float32)
    x[0, :4] = -80, 80, 0, -0.0
    there, out = elements(x, element), np.full((3, 2056), 0xFFFF, np.uint16)
    RowKernels(element, kernels).gate(there[:, gated_order(2 * 2056)].copy(), activation, out)
    wanted = REFERENCE.gate(floats(there, element).astype(np.float64), activation)
    assert error(floats(out, element), wanted) < UNIT[element]


def test_rows_by_number(kernels: Any, element: Element16) -> None:
    rows, rng = RowKernels(element, kernels), np.random.default_rng(2)
    table = elements(rng.standard_normal((9, 136)), element)
    ids = np.array([8, 0, 8, 3], np.int32)
    out = np.full((4, 136), np.nan, np.float32)
    rows.embed(table, ids, 2.5, out)
    assert np.array_equal(out, floats(table, element)[ids] * np.float32(2.5))
    given, newest = np.array([~4, 0, 8, ~0], np.int32), np.array([3, 1, 1, 1, 8], np.int32)
    same = np.full((4, 136), np.nan, np.float32)
    rows.embed(table, given, 2.5, same, newest)
    assert np.array_equal(same, out)
    some = np.zeros((4, 136), np.uint16)
    rows.gather(table, ids, some)
    assert np.array_equal(some, table[ids])
    order, back = np.array([2, 0, 3, 1], np.int32), np.zeros((4, 136), np.uint16)
    rows.scatter(some, order, back)
    assert np.array_equal(back[order], some)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_rotation(kernels: Any, element: Element16, head_dim: int) -> None:
    """Five rows of three heads, which end within a thread block, and what lies behind them."""
    rng = np.random.default_rng()
    values = floats(elements(rng.standard_normal((6, 3 * head_dim)), element), element)
    there = elements(values, element)
    RowKernels(element, kernels).rotate(there[:5], head_dim)
    rotated = rotate(values[:5].reshape(-1, head_dim)).reshape(5, -1)
    assert np.array_equal(there[:5], elements(rotated, element))
    assert np.array_equal(there[5], elements(values[5], element))


@pytest.mark.parametrize("kind", range(4))
def test_conversion(kernels: Any, element: Element16, kind: int) -> None:
    values = np.random.default_rng(3).standard_normal((16, 192)).astype(np.float32)
    factors: tuple[Any, Any] = (0, 0)
    group = 1
    if kind == 3:
        weight = quantize_weight(values, 8, 32)
        source, factors, group, wanted = weight.codes, (weight.scales, weight.biases), 32, weight.dequantize()
    else:
        source = values.astype([np.float32, np.float16, ml_dtypes.bfloat16][kind])
        wanted = source.astype(np.float32)
        source = source if kind == 0 else source.view(np.uint16)
    out = np.full(values.shape, 0xFFFF, np.uint16)
    kernel = kernels.load(convert_key(kind, element, "sm_90a"), 0)
    kernel((3,), (256,), (source, *factors, np.int32(group), np.int64(out.size), out))
    assert np.array_equal(out, elements(wanted, element))
