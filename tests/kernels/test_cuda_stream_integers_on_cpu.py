"""Products of 1 to 4 rows with codes by 16-bit integers, on this processor, against float64."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cuda import stream_integers
from kvrelay_kernels.cuda.coded_matrix import Form
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.stream_integers import Cut, StreamIntegers, StreamShape, best_cut, stream_shape
from kvrelay_kernels.quant import AffineWeight
from tests.kernels.coded_cases import DTYPES, FORMS, UNIT, activations, coded_weight, half_steps
from tests.kernels.host_kernels import COMPILER, HostKernels, planes_map

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
SUMS = 2.0**-20
"""What sums may miss of the sum of sizes."""
PROCESSORS = 4
N, K = 184, 704
"""Four bands of three tiles, the last not full; spans that fill no stage."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels of this module, each compiled once."""
    return HostKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(autouse=True)
def maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps that the emulator reads."""
    monkeypatch.setattr(stream_integers, "planes_map", planes_map)


def product(
    kernels: Any,
    x: NDArray[Any],
    weight: Any,
    bias: Any = None,
    kind: Any = np.uint16,
    shape_of: Any = stream_shape,
    processors: int = PROCESSORS,
) -> NDArray[Any]:
    element: Element16 = "float16" if x.dtype == np.float16 else "bfloat16"
    few = StreamIntegers(element, kernels, processors, shape_of)
    assert few.takes(weight, len(x))
    out = np.full((len(x), weight.shape[0]), np.nan if kind == np.float32 else 0xFFFF, kind)
    few(x.view(np.uint16), weight, bias, out)
    return out


def check(kernels: Any, x: NDArray[Any], weight: Any, codes: AffineWeight, **how: Any) -> None:
    """Results miss at most half a step of each column, and `SUMS`."""
    wide = x.astype(np.float64)
    factors = (part.astype(np.float64) for part in (codes.scales, codes.biases))
    scales, biases = (np.repeat(part, codes.group, 1) for part in factors)
    bound = half_steps(x, codes.group) @ np.abs(codes.codes * scales + biases).T
    bound += SUMS * np.abs(wide) @ (codes.codes * np.abs(scales) + np.abs(biases)).T
    missed = product(kernels, x, weight, None, np.float32, **how) - wide @ (codes.codes * scales + biases).T
    assert (np.abs(missed) < bound).all()


@pytest.mark.parametrize(
    ("name", "element", "rows"),
    [
        *((name, "bfloat16", 3) for name in FORMS),
        ("int4-g32", "float16", 1),
        ("int8-g64", "float16", 2),
        ("int8-g16-wide", "bfloat16", 1),
    ],
)
def test_against_float64(kernels: Any, name: str, element: Element16, rows: int) -> None:
    weight, codes = coded_weight(name, N, K)
    x = activations(rows, K, element)
    check(kernels, x, weight, codes)


def test_bits_depend_on_no_other_row(kernels: Any) -> None:
    """Nor on how many there are, or a neighbour's NaN or infinity."""
    weight, codes = coded_weight("int4-g32", N, K)
    x = activations(4, K, "bfloat16")
    bias = np.random.default_rng(1).standard_normal(N).astype(DTYPES["bfloat16"])
    whole = product(kernels, x, weight, bias.view(np.uint16))
    wanted = x.astype(np.float64) @ codes.dequantize().astype(np.float64).T + bias.astype(np.float64)
    found = whole.view(DTYPES["bfloat16"]).astype(np.float64)
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < UNIT["bfloat16"]
    for start, count in ((0, 1), (3, 1), (1, 2), (1, 3)):
        same = product(kernels, x[start : start + count].copy(), weight, bias.view(np.uint16))
        assert np.array_equal(same, whole[start : start + count]), f"{count} rows"
    x[1], x[2, 77] = np.nan, np.inf
    same = product(kernels, x, weight, bias.view(np.uint16))
    assert np.array_equal(same[[0, 3]], whole[[0, 3]])
    assert not np.isfinite(same[1:3].view(DTYPES["bfloat16"]).astype(np.float32)).any()


@pytest.mark.parametrize("name", ["int4-g64-wide", "int8-g16-wide"])
def test_bits_of_other_forms(kernels: Any, name: str) -> None:
    weight, _ = coded_weight(name, 72, 320)
    x = activations(4, 320, "float16")
    whole = product(kernels, x, weight, None, np.float32)
    for count in (1, 2):
        assert np.array_equal(product(kernels, x[:count].copy(), weight, None, np.float32), whole[:count])


def test_rows_of_every_size(kernels: Any) -> None:
    """Steps that are all huge, tiny or zero, side by side in a row, and rows far outside of halves' range."""
    weight, codes = coded_weight("int4-g32", N, K)
    x = np.random.default_rng(7).standard_normal((4, K))
    x[0] *= 2.0 ** (np.arange(K) // 32 * 4 - 40)
    x[1] *= np.arange(K) // 64 % 2
    x[2] *= 2.0**90
    x[3] *= 2.0**-50
    x = x.astype(DTYPES["bfloat16"])
    check(kernels, x, weight, codes)
    assert not product(kernels, np.zeros_like(x), weight, None, np.float32).any()


@pytest.mark.parametrize("shape", [(16, 2), (8, 2, 2), (4, 4), (2, 8, 2)])
def test_bits_do_not_depend_on_the_ring(kernels: Any, shape: tuple[int, ...]) -> None:
    weight, _ = coded_weight("int4-g32", N, K)
    x = activations(2, K, "bfloat16")
    usual = product(kernels, x, weight)
    assert np.array_equal(product(kernels, x, weight, shape_of=lambda *_: StreamShape(2, *shape)), usual)


@pytest.mark.parametrize(
    ("n", "k", "tiles"), [(24, 288, 2), (24, 288, 5), *((520, 160, tiles) for tiles in (1, 2, 5, 6, 14))]
)
def test_every_cut(kernels: Any, monkeypatch: pytest.MonkeyPatch, n: int, k: int, tiles: int) -> None:
    """Sizes that fill no tile, pair or span; several warps a tile, several bands a thread block."""
    monkeypatch.setattr(stream_integers, "best_cut", lambda *_: Cut(tiles))
    weight, codes = coded_weight("int4-g32", n, k)
    x = activations(2, k, "float16")
    check(kernels, x, weight, codes)


@pytest.mark.parametrize(("name", "rows"), [*((name, 4) for name in FORMS), ("int4-g32", 1)])
def test_many_columns(kernels: Any, name: str, rows: int) -> None:
    """Of x there is much in shared memory, and the ring comes round often."""
    weight, codes = coded_weight(name, 32, 14336)
    check(kernels, activations(rows, 14336, "bfloat16"), weight, codes, processors=1)


def test_cuts_of_a_model() -> None:
    """Of Llama-3.1-8B on an H200: almost an even share for every multiprocessor, and room for every k."""
    form = Form(4, 32)
    for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        cut = best_cut(n, 132)
        assert -(-n // cut.band_rows) == 128
        assert all(stream_shape(form, cut, rows, k, 1) for rows in (1, 2, 4))
    assert stream_shape(form, best_cut(4096, 132), 4, 65536, 1) is None
