"""Products of codes as they stream through shared memory, on this processor, against float64."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cuda import stream_codes
from kvrelay_kernels.cuda.clusters import Rooms
from kvrelay_kernels.cuda.coded_matrix import gated_order, pack_codes
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.stream_codes import Cut, StreamCodes, StreamShape, best_cut
from kvrelay_kernels.quant.weights import concatenate_scaled
from kvrelay_kernels.reference.backend import ReferenceBackend
from tests.kernels.coded_cases import (
    DTYPES,
    FLOAT_FORMS,
    FORMS,
    UNIT,
    activations,
    coded_weight,
    float_halves,
    float_weight,
    halves,
)
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
    ("name", "element", "rows"),
    [
        *((name, "bfloat16", 5) for name in FORMS),
        *((name, "float16", 5) for name in ("int4-g32", "int8-g64")),
        *(("int4-g32", element, 12) for element in ("bfloat16", "float16")),
        ("int8-g16-wide", "bfloat16", 12),
    ],
)
def test_against_float64(kernels: Any, name: str, element: Element16, rows: int) -> None:
    weight, codes = coded_weight(name, N, K)
    values = halves(codes, weight.unit)
    x = activations(rows, K, element)
    sums = product(streams(kernels, element), x, weight, None, np.float32)
    size = np.abs(x.astype(np.float64)) @ np.abs(values).T
    assert np.abs((sums - x.astype(np.float64) @ values.T) / size).max() < SUMS


@pytest.mark.parametrize(
    ("name", "element", "k"),
    [
        *((name, "bfloat16", K) for name in FLOAT_FORMS),
        *(("fp8-row", "float16", k) for k in (72, K)),
        ("fp8-g128", "float16", 200),
    ],
)
def test_floats_against_float64(kernels: Any, name: str, element: Element16, k: int) -> None:
    """Every number of 8 bits, also in units that are not full."""
    weight, codes = float_weight(name, N, k)
    values = float_halves(codes, weight.unit)
    x = activations(5, k, element)
    sums = product(streams(kernels, element), x, weight, None, np.float32)
    size = np.abs(x.astype(np.float64)) @ np.abs(values).T
    assert np.abs((sums - x.astype(np.float64) @ values.T) / size).max() < SUMS
    exact = codes.dequantize().astype(np.float64)
    assert (np.abs(values - exact) <= 2.0**-10 * np.abs(exact)).all()


@pytest.mark.parametrize("name", ["fp8-row", "fp8-g128"])
def test_a_gate_of_floats(kernels: Any, name: str) -> None:
    """Scales stay with their rows where a gate's and its `up`'s lie by turns."""
    parts = [float_weight(name, width, K)[1] for width in (40, 40)]
    parts[1] = parts[1].rows(np.arange(40)[::-1])
    weight = pack_codes(parts, order=gated_order(80))
    assert weight is not None
    x = (activations(3, K, "bfloat16").astype(np.float32) / 64).astype(DTYPES["bfloat16"])
    out = np.full((3, 40), np.nan, np.float32)
    streams(kernels, "bfloat16")(x.view(np.uint16), weight, None, out, "silu")
    values = float_halves(concatenate_scaled(parts), weight.unit)
    reference: Any = ReferenceBackend()
    wanted = reference.gate(x.astype(np.float64) @ values.T, "silu")
    assert np.linalg.norm(out - wanted) < 2.0**-15 * np.linalg.norm(wanted)


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
    """Units of 64 columns that are all huge, tiny or zero, side by side in a row, and an infinity.

    Of few rows thread blocks take x as it is; of more it is prepared for them.
    """
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
    twice = product(few, np.concatenate([x, x]), weight, None, np.float32)
    assert np.array_equal(twice[:5], sums[:5])
    assert np.array_equal(twice[6:11], sums[:5])
    assert not np.isfinite(twice[[5, 11]]).any()


@pytest.mark.parametrize("shape", [StreamShape(8, 4, 2), StreamShape(8, 8, 3), StreamShape(16, 4, 3)])
def test_bits_do_not_depend_on_the_ring(kernels: Any, shape: StreamShape) -> None:
    weight, _ = coded_weight("int4-g32", N, K)
    x = activations(shape.columns, K, "bfloat16")
    usual = product(streams(kernels, "bfloat16"), x, weight)
    assert np.array_equal(product(streams(kernels, "bfloat16", shape_of=lambda *_: shape), x, weight), usual)


@pytest.mark.parametrize("cut", [Cut(2, 1), Cut(16, 1), Cut(4, 4), Cut(6, 2), Cut(12, 3)], ids=str)
@pytest.mark.parametrize(("n", "k", "rows"), [(24, 288, 33), (512, 160, 3), (200, 448, 12)])
def test_every_cut(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, n: int, k: int, rows: int, cut: Cut
) -> None:
    """Sizes that fill no tile or unit; groups of warps, clusters, or several bands a thread block."""
    monkeypatch.setattr(stream_codes, "best_cut", lambda *_: cut)
    weight, codes = coded_weight("int4-g32", n, k)
    x = activations(rows, k, "float16")
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
