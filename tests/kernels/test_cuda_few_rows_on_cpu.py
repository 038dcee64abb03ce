"""Matrices of codes on this processor: products of few rows, expansion and embedding, against float64."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cuda import few_rows
from kvrelay_kernels.cuda.coded_matrix import CodedMatrix, pack_codes
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.expand_matrix import ExpandMatrix
from kvrelay_kernels.cuda.few_rows import FewRows, FewRowsShape
from kvrelay_kernels.cuda.rows import RowKernels
from kvrelay_kernels.cuda.weights import WeightLoader
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import WeightMode
from kvrelay_kernels.quant import AffineWeight
from kvrelay_kernels.quant.weights import quantize_scaled, quantize_weight
from kvrelay_kernels.reference.backend import ReferenceBackend
from tests.kernels.coded_cases import (
    DTYPES,
    FLOAT_FORMS,
    FORMS,
    UNIT,
    activations,
    coded_weight,
    float_weight,
)
from tests.kernels.host_kernels import COMPILER, HostKernels

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
SUMS = {"float16": 2.0**-18, "bfloat16": 2.0**-15}
"""What sums may miss of the sum of sizes: with bfloat16, codes come with 128 added."""
PROCESSORS = 2
N, K = 88, 704


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers ask the device for its architecture."""
    for module in ("few_rows", "expand_matrix", "rows", "weights"):
        monkeypatch.setattr(f"kvrelay_kernels.cuda.{module}.device_arch", lambda: "sm_90a")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels of this module, each compiled once."""
    return HostKernels(tmp_path_factory.mktemp("kernels"))


def weight_of(name: str, n: int, k: int, element: str) -> tuple[Any, NDArray[np.float64]]:
    """A weight, and the values it stands for."""
    if name == "16":
        values = np.random.default_rng(n * k).standard_normal((n, k)).astype(DTYPES[element])
        return values.view(np.uint16), values.astype(np.float64)
    matrix, codes = (float_weight if name in FLOAT_FORMS else coded_weight)(name, n, k)
    return matrix, codes.dequantize().astype(np.float64)


def product(kernels: Any, x: NDArray[Any], weight: Any, bias: Any, element: Element16) -> NDArray[np.uint16]:
    out = np.full((len(x), weight.shape[0]), 0xFFFF, np.uint16)
    FewRows(element, kernels, PROCESSORS)(x.view(np.uint16), weight, bias, out)
    return out


@pytest.mark.parametrize(
    ("name", "element"),
    [
        *((name, "bfloat16") for name in (*FORMS, *FLOAT_FORMS, "16")),
        *((name, "float16") for name in ("int4-g32", "int8-g64", "fp8-row")),
    ],
)
def test_against_float64(kernels: Any, name: str, element: Element16) -> None:
    weight, values = weight_of(name, N, K, element)
    for rows in (1, 8):
        x = activations(rows, K, element)
        wanted = x.astype(np.float64) @ values.T
        out = np.full((rows, N), np.nan, np.float32)
        FewRows(element, kernels, PROCESSORS)(x.view(np.uint16), weight, None, out)
        size = np.abs(x.astype(np.float64)) @ np.abs(values).T
        assert np.abs((out - wanted) / size).max() < SUMS[element]


@pytest.mark.parametrize(("name", "element"), [("int4-g32", "bfloat16"), ("16", "float16")])
def test_bits_depend_on_no_other_row(kernels: Any, name: str, element: Element16) -> None:
    """Nor on how many there are, how the work is cut, or a neighbour's NaN; 70 rows take two launches."""
    weight, values = weight_of(name, N, K, element)
    x = activations(70, K, element)
    bias = np.random.default_rng(1).standard_normal(N).astype(DTYPES[element])
    whole = product(kernels, x, weight, bias.view(np.uint16), element)
    wanted = x.astype(np.float64) @ values.T + bias.astype(np.float64)
    found = whole.view(DTYPES[element]).astype(np.float64)
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < UNIT[element]
    for start, count in ((69, 1), (5, 3), (20, 17), (0, 64)):
        part = x[start : start + count].copy()
        part[1 : count // 2] = np.nan
        same = product(kernels, part, weight, bias.view(np.uint16), element)
        kept = [0, *range(max(1, count // 2), count)]
        assert np.array_equal(same[kept], whole[start : start + count][kept]), f"{count} rows"


@pytest.mark.parametrize("shape", [FewRowsShape(2, 1, 1, 1), FewRowsShape(4, 1, 3, 1)])
def test_bits_do_not_depend_on_the_launch(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, shape: FewRowsShape
) -> None:
    weight, _ = weight_of("int4-g32", N, K, "bfloat16")
    x = activations(8 * shape.columns, K, "bfloat16")
    usual = product(kernels, x, weight, None, "bfloat16")
    monkeypatch.setattr(few_rows, "few_rows_shape", lambda *_: shape)
    assert np.array_equal(product(kernels, x, weight, None, "bfloat16"), usual)


@pytest.mark.parametrize("name", ["int4-g32", "fp8-row", "16"])
@pytest.mark.parametrize(("n", "k"), [(24, 96), (5, 32), (200, 1056)])
def test_sizes_that_fill_no_tile(kernels: Any, name: str, n: int, k: int) -> None:
    weight, values = weight_of(name, n, k, "float16")
    x = activations(3, k, "float16")
    found = product(kernels, x, weight, None, "float16").view(np.float16)
    wanted = x.astype(np.float64) @ values.T
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < UNIT["float16"]


@pytest.mark.parametrize(
    ("name", "element"),
    [
        ("int4-g32", "float16"),
        ("int8-g64", "bfloat16"),
        ("int8-g16-wide", "bfloat16"),
        ("fp8-row", "bfloat16"),
        ("fp8-g128", "float16"),
    ],
)
def test_expansion_and_embedding(kernels: Any, name: str, element: Element16) -> None:
    """Rounded once, like the definition's values in float32."""
    width = 192 if "g64" in name else 224
    weight, values = weight_of(name, 40, width, element)
    out = np.full(weight.shape, 0xFFFF, np.uint16)
    ExpandMatrix(element, kernels)(weight, out)
    assert np.array_equal(out, values.astype(np.float32).astype(DTYPES[element]).view(np.uint16))
    ids = np.array([39, 0, 8, 39], np.int32)
    rows = np.full((4, width), np.nan, np.float32)
    RowKernels(element, kernels).embed(weight, ids, 2.5, rows)
    assert np.array_equal(rows, values.astype(np.float32)[ids] * np.float32(2.5))


def test_parts_of_several_widths_lose_nothing(kernels: Any) -> None:
    rng = np.random.default_rng(5)
    first, second, third = (rng.standard_normal((n, 256)).astype(np.float32) for n in (24, 8, 16))
    parts = [quantize_weight(first, 4, 128), quantize_weight(second, 6, 16), quantize_weight(third, 8, 64)]
    matrix = pack_codes(parts)
    assert isinstance(matrix, CodedMatrix)
    assert (matrix.bits, matrix.group) == (8, 16)
    out = np.full(matrix.shape, 0xFFFF, np.uint16)
    ExpandMatrix("float16", kernels)(matrix, out)
    assert np.array_equal(
        out.view(np.float16), np.concatenate([part.dequantize() for part in parts]).astype(np.float16)
    )


def test_scales_are_rounded_where_they_may_be() -> None:
    values = np.random.default_rng(6).standard_normal((16, 64)).astype(np.float32)
    for size, rounded, kind in ((1, True, np.float16), (1, False, np.float32), (1e-6, True, np.float16)):
        matrix = pack_codes([quantize_weight(values * np.float32(size), 4, 32)], rounded)
        assert matrix is not None
        assert matrix.factors.dtype == kind
    factors = np.full((16, 2), 0.375, np.float32)
    matrix = pack_codes([AffineWeight(np.zeros((16, 64), np.uint8), factors, factors, 4)])
    assert matrix is not None
    assert matrix.factors.dtype == np.float16
    assert pack_codes([quantize_weight(values, 4, 8)]) is None


@pytest.fixture
def numpy_as_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loader asks of CuPy, from NumPy."""
    pool = SimpleNamespace(free_all_blocks=lambda: None)
    names = ("empty", "asarray", "ascontiguousarray")
    library = SimpleNamespace(
        **{name: getattr(np, name) for name in names}, get_default_memory_pool=lambda: pool
    )
    monkeypatch.setitem(sys.modules, "cupy", library)


@pytest.mark.parametrize("mode", ["auto", "float", "int8", "int4", "fp8"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "codes", "mixed", "fp8", "fp8 and codes"])
def test_loading(kernels: Any, numpy_as_cupy: None, mode: WeightMode, kind: str) -> None:
    """The same matrices as the reference's, in codes wherever they can be."""
    values = [np.random.default_rng(n).standard_normal((n, 192)).astype(np.float32) for n in (64, 24)]
    parts: list[Any] = list(values)
    if kind == "bfloat16":
        parts = [part.astype(DTYPES[kind]) for part in values]
    elif kind.startswith("fp8"):
        parts[0] = quantize_scaled(values[0])
        blocks = float_weight("fp8-g128", 24, 192)[1]
        parts[1] = quantize_weight(values[1], 8, 32) if "codes" in kind else blocks
    elif kind != "float32":
        parts[0] = quantize_weight(values[0], 4, 64)
        parts[1] = quantize_weight(values[1], 8, 32) if kind == "codes" else values[1]
    reference: Any = ReferenceBackend()
    ids = np.arange(88, dtype=np.int32)
    wanted = reference.embed(reference.load_linear(parts, mode), ids, 1.0)
    weight = WeightLoader("float16", kernels).matrix(parts, mode, None).weight
    kept = mode == "auto" and kind in ("codes", "fp8")
    assert isinstance(weight, CodedMatrix) == (kept or mode in ("int8", "int4", "fp8"))
    rows = np.full((88, 192), np.nan, np.float32)
    RowKernels("float16", kernels).embed(weight, ids, 1.0, rows)
    assert np.linalg.norm(rows - wanted) / np.linalg.norm(wanted) < 2 * UNIT["float16"]


@pytest.mark.parametrize("mode", ["auto", "int4"])
@pytest.mark.parametrize("kind", ["float32", "codes", "mixed", "fp8"])
def test_loading_a_gate(kernels: Any, numpy_as_cupy: None, mode: WeightMode, kind: str) -> None:
    """Its rows and those of `up`, 8 and 8, at the widest codes and the finest group of both."""
    values = [np.random.default_rng(n).standard_normal((24, 192)).astype(np.float32) for n in range(2)]
    parts: list[Any] = list(values)
    if kind == "fp8":
        parts = [quantize_scaled(values[0]), float_weight("fp8-g128", 24, 192)[1]]
    elif kind != "float32":
        parts[0] = quantize_weight(values[0], 4, 64)
        parts[1] = quantize_weight(values[1], 8, 32) if kind == "codes" else values[1]
    ids = np.arange(48, dtype=np.int32)
    plain = WeightLoader("float16", kernels).matrix(parts, mode, None)
    gated = WeightLoader("float16", kernels).matrix(parts, mode, None, gated=True)
    assert (gated.coded, gated.n, gated.k) == (plain.coded, 48, 192)
    below, by_turns = np.full((2, 48, 192), np.nan, np.float32)
    RowKernels("float16", kernels).embed(plain.weight, ids, 1.0, below)
    RowKernels("float16", kernels).embed(gated.weight, ids, 1.0, by_turns)
    for tile in range(3):
        for part in range(2):
            first, of_gate = 24 * part + 8 * tile, 16 * tile + 8 * part
            assert np.array_equal(by_turns[of_gate : of_gate + 8], below[first : first + 8])


@pytest.mark.parametrize("rows", [(12, 12), (16, 32)])
def test_a_gate_that_fills_no_tiles(kernels: Any, numpy_as_cupy: None, rows: tuple[int, int]) -> None:
    parts = [np.ones((n, 64), np.float32) for n in rows]
    with pytest.raises(FormatUnsupported, match="`up`"):
        WeightLoader("float16", kernels).matrix(parts, "auto", None, gated=True)
