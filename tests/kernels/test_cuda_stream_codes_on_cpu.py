"""Products of codes as they stream through shared memory, on this processor, against float64."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.stream_codes import StreamCodes, StreamShape
from kvrelay_kernels.quant import AffineWeight
from tests.kernels.coded_cases import DTYPES, FORMS, UNIT, activations, coded_weight, rounded_scales
from tests.kernels.host_kernels import COMPILER, HostKernels

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
SUMS = 2.0**-18
"""What sums may miss of the sum of sizes."""
PROCESSORS = 3
N, K = 344, 704
"""One whole band of 256 rows and a part; each multiprocessor begins and ends within a band."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels of this module, each compiled once."""
    return HostKernels(tmp_path_factory.mktemp("kernels"))


def halves(codes: AffineWeight) -> NDArray[np.float64]:
    """The matrix that is multiplied with: scales, then values rounded to halves."""
    part = rounded_scales(codes)
    group = codes.codes.shape[1] // part.scales.shape[1]
    scales, biases = (np.repeat(each.astype(np.float64), group, 1) for each in (part.scales, part.biases))
    return (part.codes * scales + biases).astype(np.float16).astype(np.float64)


def streams(kernels: Any, element: Element16, processors: int = PROCESSORS, **how: Any) -> StreamCodes:
    """The kernels, their workspace NaN."""
    arrays = SimpleNamespace(empty=lambda shape, kind: np.full(shape, np.nan, kind), zeros=np.zeros)
    return StreamCodes(element, kernels, processors, arrays, **how)


def product(
    few: StreamCodes, x: NDArray[Any], weight: Any, bias: Any = None, kind: Any = np.uint16
) -> NDArray[Any]:
    out = np.full((len(x), weight.shape[0]), np.nan if kind == np.float32 else 0xFFFF, kind)
    few(x.view(np.uint16), weight, bias, out)
    return out


@pytest.mark.parametrize(
    ("name", "element"),
    [*((name, "bfloat16") for name in FORMS), ("int4-g32", "float16"), ("int8-g64", "float16")],
)
def test_against_float64(kernels: Any, name: str, element: Element16) -> None:
    weight, codes = coded_weight(name, N, K)
    values = halves(codes)
    x = activations(5, K, element)
    sums = product(streams(kernels, element), x, weight, None, np.float32)
    size = np.abs(x.astype(np.float64)) @ np.abs(values).T
    assert np.abs((sums - x.astype(np.float64) @ values.T) / size).max() < SUMS


def test_bits_depend_on_no_other_row(kernels: Any) -> None:
    """Nor on how many there are, or a neighbour's NaN; 70 rows take two launches."""
    weight, codes = coded_weight("int4-g32", N, K)
    x = activations(70, K, "bfloat16")
    bias = np.random.default_rng(1).standard_normal(N).astype(DTYPES["bfloat16"])
    few = streams(kernels, "bfloat16")
    whole = product(few, x, weight, bias.view(np.uint16))
    wanted = x.astype(np.float64) @ halves(codes).T + bias.astype(np.float64)
    found = whole.view(DTYPES["bfloat16"]).astype(np.float64)
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < UNIT["bfloat16"]
    for start, count in ((69, 1), (5, 3), (50, 12), (20, 17)):
        part = x[start : start + count].copy()
        part[1 : count // 2] = np.nan
        same = product(few, part, weight, bias.view(np.uint16))
        kept = [0, *range(max(1, count // 2), count)]
        assert np.array_equal(same[kept], whole[start : start + count][kept]), f"{count} rows"
        assert np.isnan(same[1 : count // 2].view(DTYPES["bfloat16"])).all()


def test_bfloat16_outside_the_range_of_halves(kernels: Any) -> None:
    """Units of 64 columns that are all huge, tiny or zero, side by side in a row, and an infinity."""
    weight, codes = coded_weight("int4-g32", N, K)
    values = halves(codes)
    x = np.random.default_rng(7).standard_normal((6, K))
    for unit in range(K // 64):
        x[0, 64 * unit : 64 * unit + 64] *= 2.0 ** (6 * unit - 30)
        x[1, 64 * unit : 64 * unit + 64] *= 2.0 ** (30 - 12 * unit)
        x[2, 64 * unit : 64 * unit + 64] *= unit % 2
    x[3] *= 2.0**90
    x[4] *= 2.0**-50
    x[5, 9] = np.inf
    x = x.astype(DTYPES["bfloat16"])
    few = streams(kernels, "bfloat16")
    sums = product(few, x, weight, None, np.float32)
    size = np.abs(x[:5].astype(np.float64)) @ np.abs(values).T
    assert np.abs((sums[:5] - x[:5].astype(np.float64) @ values.T) / size).max() < SUMS
    assert not np.isfinite(sums[5]).any()
    assert np.array_equal(sums[:5], product(few, x[:5].copy(), weight, None, np.float32))


@pytest.mark.parametrize("shape", [StreamShape(8, 1, 3), StreamShape(8, 2, 5)])
def test_bits_do_not_depend_on_the_ring(kernels: Any, shape: StreamShape) -> None:
    weight, _ = coded_weight("int4-g32", N, K)
    x = activations(8, K, "bfloat16")
    usual = product(streams(kernels, "bfloat16"), x, weight)
    assert np.array_equal(product(streams(kernels, "bfloat16", shape_of=lambda *_: shape), x, weight), usual)


@pytest.mark.parametrize("processors", [1, 2, 7])
@pytest.mark.parametrize(("n", "k"), [(24, 96), (512, 32), (600, 448)])
def test_every_cut(kernels: Any, n: int, k: int, processors: int) -> None:
    """Sizes that fill no band or unit, whole bands, and bands in many pieces."""
    weight, codes = coded_weight("int4-g32", n, k)
    x = activations(3, k, "float16")
    found = product(streams(kernels, "float16", processors), x, weight).view(np.float16)
    wanted = x.astype(np.float64) @ halves(codes).T
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < UNIT["float16"]
