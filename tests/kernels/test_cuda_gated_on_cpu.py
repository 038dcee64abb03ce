"""Products with gated matrices, whose kernels gate their sums, run on this processor, against float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cuda import stream_codes, stream_integers, stream_rows
from kvrelay_kernels.cuda.coded_matrix import gated_order, pack_codes
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.few_rows import FewRows
from kvrelay_kernels.cuda.stream_codes import Cut, StreamCodes
from kvrelay_kernels.cuda.stream_integers import StreamIntegers
from kvrelay_kernels.cuda.stream_rows import StreamRows, StreamShape
from kvrelay_kernels.interface import Activation
from kvrelay_kernels.quant.weights import concatenate, quantize_weight
from kvrelay_kernels.reference.backend import ReferenceBackend
from tests.kernels.coded_cases import DTYPES, UNIT, activations, half_steps, halves
from tests.kernels.host_kernels import COMPILER, HostKernels, matrix_map, planes_map

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
REFERENCE: Any = ReferenceBackend()
SUMS = 2.0**-15
"""What sums may miss of the sum of sizes; with float16 less."""
STEEPEST = 1.13
"""Slope of either activation."""

Launch = Callable[[NDArray[Any], NDArray[Any], Activation], None]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels of this module, each compiled once."""
    return HostKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(autouse=True)
def this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps that the emulator reads; launchers ask the device for its architecture."""
    monkeypatch.setattr(stream_rows, "matrix_map", matrix_map)
    monkeypatch.setattr(stream_codes, "planes_map", planes_map)
    monkeypatch.setattr(stream_integers, "planes_map", planes_map)
    monkeypatch.setattr("kvrelay_kernels.cuda.few_rows.device_arch", lambda: "sm_90a")


class GatedCase:
    """A gate and its `up`, as a kernel has them, and their values one below the other.

    Codes of them may be `rounded` to halves as they are multiplied.
    """

    def __init__(self, width: int, k: int, element: str, bits: int = 16, rounded: bool = False) -> None:
        self.width, self.k, self.element = width, k, element
        rng = np.random.default_rng([width, k])
        parts = [(rng.standard_normal((width, k)) / np.sqrt(16 * k)).astype(np.float32) for _ in range(2)]
        order = gated_order(2 * width)
        if bits == 16:
            whole = np.concatenate(parts).astype(DTYPES[element])
            self.weight: Any = whole[order].view(np.uint16)
            self.values = whole.astype(np.float64)
        else:
            groups = 32, 64 if k % 64 == 0 else 32
            codes = [quantize_weight(part, bits, group) for part, group in zip(parts, groups, strict=True)]
            self.weight = pack_codes(codes, order=order)
            whole = concatenate(codes)
            self.values = (
                halves(whole, self.weight.unit) if rounded else whole.dequantize().astype(np.float64)
            )

    def check(self, launch: Launch, activation: Activation, rows: int, integers: bool = False) -> None:
        """Each sum within its bound, in both types of result; NaN stays in its row.

        `integers`: x is rounded to them.
        """
        x = activations(rows, self.k, self.element)
        out = np.full((rows, self.width), np.nan, np.float32)
        launch(x.view(np.uint16), out, activation)
        wide = x.astype(np.float64)
        sums = wide @ self.values.T
        missed = SUMS * (np.abs(wide) @ np.abs(self.values).T)
        if integers:
            missed += half_steps(x, self.weight.group) @ np.abs(self.values).T
        gate, up = np.split(sums, 2, 1)
        gate_missed, up_missed = np.split(missed, 2, 1)
        wanted = REFERENCE.gate(sums, activation)
        bound = STEEPEST * gate_missed * (np.abs(up) + up_missed) + np.abs(gate) * up_missed
        bound += 2.0**-20 * (1 + np.abs(gate)) * np.abs(wanted) + 1e-30
        assert (np.abs(out - wanted) < bound).all()
        assert np.linalg.norm(out - wanted) < 2 * UNIT[self.element] * np.linalg.norm(wanted)
        narrow = np.full((rows, self.width), 0xFFFF, np.uint16)
        launch(x.view(np.uint16), narrow, activation)
        found = narrow.view(DTYPES[self.element])
        assert np.array_equal(found, out.astype(DTYPES[self.element]))
        spoilt = x.copy()
        spoilt[rows - 1, 3] = np.nan
        launch(spoilt.view(np.uint16), narrow, activation)
        assert np.array_equal(narrow[:-1], found.view(np.uint16)[:-1])
        assert np.isnan(narrow[-1:].view(DTYPES[self.element])).all()


@pytest.mark.parametrize(
    ("activation", "element", "width", "k", "processors"),
    [
        ("silu", "bfloat16", 96, 192, 3),  # a tile a block
        ("gelu_tanh", "float16", 168, 328, 2),  # two tiles a block, the last of them not full
        ("gelu_tanh", "bfloat16", 8, 72, 2),
    ],
)
def test_streams_of_rows(
    kernels: Any, activation: Activation, element: Element16, width: int, k: int, processors: int
) -> None:
    case = GatedCase(width, k, element)
    streams = StreamRows(element, kernels, processors)
    case.check(lambda x, out, a: streams(x, case.weight, None, out, a), activation, 5)


def test_streams_of_rows_in_narrow_tiles(kernels: Any) -> None:
    case = GatedCase(40, 264, "bfloat16")
    streams = StreamRows("bfloat16", kernels, 2, lambda n, columns, *_: StreamShape(48, columns, 2, 40 << 10))
    case.check(lambda x, out, a: streams(x, case.weight, None, out, a), "silu", 12)


@pytest.mark.parametrize(
    ("activation", "element", "cut"),
    [
        ("silu", "bfloat16", Cut(4, 1)),  # groups of warps
        ("gelu_tanh", "float16", Cut(14, 1)),  # several bands a thread block
        ("silu", "bfloat16", Cut(4, 2)),  # clusters
    ],
)
def test_streams_of_codes(
    kernels: Any,
    monkeypatch: pytest.MonkeyPatch,
    activation: Activation,
    element: Element16,
    cut: Cut,
) -> None:
    monkeypatch.setattr(stream_codes, "best_cut", lambda *_: cut)
    case = GatedCase(152, 448, element, bits=4, rounded=True)
    rooms = {1: 64 if cut.groups > 1 else 1, 2: 64}
    streams = StreamCodes(element, kernels, rooms[1], rooms)
    case.check(lambda x, out, a: streams(x, case.weight, None, out, a), activation, 5)


@pytest.mark.parametrize(
    ("activation", "element", "bits", "processors"),
    [("silu", "bfloat16", 4, 8), ("gelu_tanh", "float16", 8, 2)],  # three tiles a thread block, and ten
)
def test_streams_of_integers(
    kernels: Any, activation: Activation, element: Element16, bits: int, processors: int
) -> None:
    case = GatedCase(152, 448, element, bits)
    streams = StreamIntegers(element, kernels, processors)
    case.check(lambda x, out, a: streams(x, case.weight, None, out, a), activation, 4, integers=True)


@pytest.mark.parametrize(
    ("activation", "element", "width", "k", "bits"),
    [("silu", "bfloat16", 88, 704, 4), ("gelu_tanh", "float16", 24, 96, 8), ("silu", "float16", 8, 40, 16)],
)
def test_few_rows(
    kernels: Any, activation: Activation, element: Element16, width: int, k: int, bits: int
) -> None:
    case = GatedCase(width, k, element, bits)
    few = FewRows(element, kernels, 2)
    case.check(lambda x, out, a: few(x, case.weight, None, out, a), activation, 3)


def test_the_order_of_rows() -> None:
    order = gated_order(48)
    assert order.tolist() == [
        *range(8), *range(24, 32), *range(8, 16), *range(32, 40), *range(16, 24), *range(40, 48)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="reshape"):
        gated_order(24)
