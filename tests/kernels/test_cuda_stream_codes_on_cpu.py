"""Products of codes as they stream through shared memory, on this processor, against float64."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cuda import stream_codes
from kvrelay_kernels.cuda.clusters import Rooms
from kvrelay_kernels.cuda.coded_matrix import BIAS_UNIT
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.stream_codes import Cut, StreamCodes, StreamShape, best_cut
from kvrelay_kernels.quant import AffineWeight
from tests.kernels.coded_cases import DTYPES, FORMS, UNIT, activations, coded_weight, rounded_scales
from tests.kernels.host_kernels import COMPILER, HostKernels, planes_map

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
SUMS = 2.0**-18
"""What sums may miss of the sum of sizes."""
ROOMS = {1: 4, 2: 2}
N, K = 344, 704
"""Two bands, the second not full, each of two thread blocks that share 11 units."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels of this module, each compiled once."""
    return HostKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(autouse=True)
def maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps that the emulator reads."""
    monkeypatch.setattr(stream_codes, "planes_map", planes_map)


def halves(codes: AffineWeight, unit: float) -> NDArray[np.float64]:
    """The matrix that is multiplied with: scales, then values rounded to halves."""
    part = rounded_scales(codes, unit)
    factors = (part.scales.astype(np.float64), part.biases.astype(np.float64))
    scales, biases = (np.repeat(each, part.group, 1) for each in factors)
    one = unit * BIAS_UNIT
    return ((part.codes * scales + biases) / one).astype(np.float16).astype(np.float64) * one


def streams(kernels: Any, element: Element16, rooms: Rooms = ROOMS, **how: Any) -> StreamCodes:
    """The kernels, on a device that runs so many clusters."""
    return StreamCodes(element, kernels, rooms[1], rooms, **how)


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
    values = halves(codes, weight.unit)
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
    wanted = x.astype(np.float64) @ halves(codes, weight.unit).T + bias.astype(np.float64)
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
    values = halves(codes, weight.unit)
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


@pytest.mark.parametrize("shape", [StreamShape(8, 4, 2), StreamShape(8, 8, 3)])
def test_bits_do_not_depend_on_the_ring(kernels: Any, shape: StreamShape) -> None:
    weight, _ = coded_weight("int4-g32", N, K)
    x = activations(8, K, "bfloat16")
    usual = product(streams(kernels, "bfloat16"), x, weight)
    assert np.array_equal(product(streams(kernels, "bfloat16", shape_of=lambda *_: shape), x, weight), usual)


@pytest.mark.parametrize("cut", [Cut(2, 1), Cut(16, 1), Cut(4, 4), Cut(6, 2), Cut(12, 3)], ids=str)
@pytest.mark.parametrize(("n", "k"), [(24, 288), (512, 160), (200, 448)])
def test_every_cut(kernels: Any, monkeypatch: pytest.MonkeyPatch, n: int, k: int, cut: Cut) -> None:
    """Sizes that fill no tile or unit; groups of warps, clusters, or several bands a thread block."""
    monkeypatch.setattr(stream_codes, "best_cut", lambda *_: cut)
    weight, codes = coded_weight("int4-g32", n, k)
    x = activations(3, k, "float16")
    few = streams(kernels, "float16", {1: 1 if cut.groups == 1 else 64})
    found = product(few, x, weight).view(np.float16)
    wanted = x.astype(np.float64) @ halves(codes, weight.unit).T
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < UNIT["float16"]


def test_cuts_of_a_model() -> None:
    """Of Llama-3.1-8B on an H200: almost an even share for every multiprocessor."""
    rooms = tuple({1: 132, 2: 66, 3: 39, 4: 30, 5: 22, 6: 17, 7: 15, 8: 15}.items())
    for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        cut = best_cut(n, k, rooms)
        assert -(-n // cut.band_rows) * cut.cluster == 128
    assert best_cut(4096, 4096, ((1, 132),)).cluster == 1
