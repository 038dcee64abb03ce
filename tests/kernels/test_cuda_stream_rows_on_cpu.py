"""Products that stream 16-bit weights, run on this processor, against float64."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cuda import stream_rows
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.stream_rows import MOST_ROWS, StreamRows, StreamShape
from tests.kernels.host_kernels import COMPILER, HostKernels, matrix_map

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
SUMS = 2.0**-21
"""What sums in float32 may miss of the sum of sizes."""
SHAPE = StreamShape(groups=1, blocks_per_sm=1, ring_bytes=48 << 10)
WIDE = StreamShape(groups=2, blocks_per_sm=1, ring_bytes=80 << 10)


@pytest.fixture(autouse=True)
def maps_of_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_rows, "matrix_map", matrix_map)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels of this module, each compiled once."""
    return HostKernels(tmp_path_factory.mktemp("kernels"))


def launcher(kernels: Any, element: Element16, blocks: int, shape: StreamShape = SHAPE) -> StreamRows:
    """On `blocks` thread blocks, whose workspace is NaN."""
    found = StreamRows(element, kernels, blocks, np, shape)
    found._pieces.fill(np.nan)  # pyright: ignore[reportPrivateUsage]
    return found


def numbers(rows: int, k: int, element: str) -> NDArray[Any]:
    """Standard normal, but a few columns a thousand times as large, and a row far below all others."""
    rng = np.random.default_rng([rows, k])
    x = rng.standard_normal((rows, k))
    x[:, rng.integers(0, k, 3)] *= 1000
    x[rows // 2] *= 1e-3
    return x.astype(DTYPES[element])


def sums_of(streams: StreamRows, x: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.float32]:
    out = np.full((len(x), len(weight)), np.nan, np.float32)
    streams(x.view(np.uint16), weight.view(np.uint16), None, out)
    return out


@pytest.mark.parametrize(
    ("n", "k", "blocks", "shape"),
    [
        (192, 192, 1, SHAPE),  # every tile whole
        (192, 320, 2, SHAPE),  # one tile in two pieces
        (128, 640, 7, SHAPE),  # tiles in four pieces, blocks within one tile
        (200, 328, 4, WIDE),  # what fills neither a tile nor a unit
        (33, 72, 5, SHAPE),  # fewer units than blocks, odd n
    ],
)
@pytest.mark.parametrize("element", ["float16", "bfloat16"])
def test_against_float64(
    kernels: Any, element: Element16, n: int, k: int, blocks: int, shape: StreamShape
) -> None:
    weight, x = numbers(n, k, element), numbers(5, k, element)
    streams = launcher(kernels, element, blocks, shape)
    size = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T
    wanted = x.astype(np.float64) @ weight.astype(np.float64).T
    first = sums_of(streams, x, weight)
    assert np.abs((first - wanted) / size).max() < SUMS
    assert np.array_equal(sums_of(streams, x, weight), first)  # arrivals count from zero again


@pytest.mark.parametrize(("n", "k"), [(136, 264), (65, 264)])
@pytest.mark.parametrize("element", ["float16", "bfloat16"])
def test_bits_depend_on_no_other_row(kernels: Any, element: Element16, n: int, k: int) -> None:
    """Nor on how many there are, or a neighbour's NaN; more than `MOST_ROWS` take two launches."""
    weight, x = numbers(n, k, element), numbers(MOST_ROWS + 3, k, element)
    bias = np.random.default_rng(1).standard_normal(n).astype(DTYPES[element])
    streams = launcher(kernels, element, 3)

    def product(x: NDArray[Any]) -> NDArray[np.uint16]:
        out = np.full((len(x), n), 0xFFFF, np.uint16)
        streams(x.view(np.uint16), weight.view(np.uint16), bias.view(np.uint16), out)
        return out

    whole = product(x)
    wanted = x.astype(np.float64) @ weight.astype(np.float64).T + bias.astype(np.float64)
    found = whole.view(DTYPES[element]).astype(np.float64)
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < UNIT[element]
    for start, count in ((MOST_ROWS + 2, 1), (5, 3), (7, 9), (20, 17), (0, 33)):
        part = x[start : start + count].copy()
        part[1 : count // 2] = np.nan
        same = product(part)
        kept = [0, *range(max(1, count // 2), count)]
        assert np.array_equal(same[kept], whole[start : start + count][kept]), f"{count} rows"


def test_a_weight_whose_rows_the_copy_engine_cannot_find(kernels: Any) -> None:
    streams = launcher(kernels, "float16", 1)
    assert streams.takes(np.empty((64, 72), np.uint16))
    assert not streams.takes(np.empty((64, 68), np.uint16))
