"""Products that stream 16-bit weights, run on this processor, against float64."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cuda import stream_rows
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.stream_rows import MOST_ROWS, StreamRows, StreamShape, stream_shape
from tests.kernels.host_kernels import COMPILER, HostKernels, matrix_map

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
SUMS = 2.0**-21
"""What sums in float32 may miss of the sum of sizes."""


@pytest.fixture(autouse=True)
def maps_of_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_rows, "matrix_map", matrix_map)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels of this module, each compiled once."""
    return HostKernels(tmp_path_factory.mktemp("kernels"))


def numbers(rows: int, k: int, element: str) -> NDArray[Any]:
    """Standard normal, but a few columns a thousand times as large, and a row far below all others."""
    rng = np.random.default_rng([rows, k])
    x = rng.standard_normal((rows, k))
    x[:, rng.integers(0, k, 3)] *= 1000
    x[rows // 2] *= 1e-3
    return x.astype(DTYPES[element])


@pytest.mark.parametrize(
    ("n", "k", "processors"),
    [
        (192, 192, 3),  # a tile a block
        (328, 328, 2),  # two tiles a block; what fills neither a tile nor a unit
        (33, 72, 2),  # odd n
        (20, 456, 1),  # several panels at once
        (40, 64, 8),  # fewer units of rows than processors
    ],
)
@pytest.mark.parametrize("element", ["float16", "bfloat16"])
def test_against_float64(kernels: Any, element: Element16, n: int, k: int, processors: int) -> None:
    weight, x = numbers(n, k, element), numbers(5, k, element)
    out = np.full((5, n), np.nan, np.float32)
    StreamRows(element, kernels, processors)(x.view(np.uint16), weight.view(np.uint16), None, out)
    size = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T
    wanted = x.astype(np.float64) @ weight.astype(np.float64).T
    assert np.abs((out - wanted) / size).max() < SUMS


@pytest.mark.parametrize("shape", [StreamShape(24, 8, 3, 40 << 10), StreamShape(128, 8, 1, 50 << 10)])
def test_bits_do_not_depend_on_how_the_work_is_spread(kernels: Any, shape: StreamShape) -> None:
    weight, x = numbers(280, 584, "bfloat16"), numbers(8, 584, "bfloat16")
    outs = np.full((2, 8, 280), np.nan, np.float32)
    for out, shape_of in zip(outs, (stream_shape, lambda *_: shape), strict=True):
        streams = StreamRows("bfloat16", kernels, 3, shape_of)
        streams(x.view(np.uint16), weight.view(np.uint16), None, out)
    assert np.array_equal(outs[0], outs[1])


@pytest.mark.parametrize(("n", "k"), [(136, 264), (65, 264)])
@pytest.mark.parametrize("element", ["float16", "bfloat16"])
def test_bits_depend_on_no_other_row(kernels: Any, element: Element16, n: int, k: int) -> None:
    """Nor on how many there are, or a neighbour's NaN; more than `MOST_ROWS` take two launches."""
    weight, x = numbers(n, k, element), numbers(MOST_ROWS + 3, k, element)
    bias = np.random.default_rng(1).standard_normal(n).astype(DTYPES[element])
    streams = StreamRows(element, kernels, 3)

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
    streams = StreamRows("float16", kernels, 1)
    assert streams.takes(np.empty((64, 72), np.uint16))
    assert not streams.takes(np.empty((64, 68), np.uint16))
