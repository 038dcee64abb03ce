"""CUDA kernels that write and expand blocks, run on this processor, against bytes and values of quant/."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cuda.batch import DeviceBatch, slots_of
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.expand import Expansion, Scratch
from kvrelay_kernels.cuda.rope import RopeAppend
from kvrelay_kernels.interface import RopeTable
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout
from kvrelay_kernels.quant.codec import dequantize
from kvrelay_kernels.quant.levels import MAGNITUDES, edges_of
from kvrelay_kernels.quant.rotation import rotate
from tests.gpu.append_case import UNTOUCHED, AppendCase, expected, make_case, same_bytes, with_extremes
from tests.gpu.paged_cache import DTYPES
from tests.gpu.poisoned import UNIT, error
from tests.kernels.elements import elements, floats
from tests.kernels.host_kernels import COMPILER, HostKernels

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
STEP = [6, 1, 5], [60, 130, 0]
HEADS = {64: (9, 3, 64), 96: (12, 4, 96), 128: (8, 4, 128), 256: (4, 1, 256)}
TURNED = {64: 64, 96: 32, 128: 128, 256: 256}
CASES: list[tuple[str, int, Element16, bool]] = [
    ("none", 128, "float16", True),
    ("none", 256, "bfloat16", False),
    ("int8-g64", 64, "float16", True),
    ("int8-g32", 96, "bfloat16", False),
    ("int6-g64", 128, "bfloat16", False),
    ("int6-g32", 96, "float16", False),
    ("int4-g64", 128, "bfloat16", True),
    ("int4-g32", 256, "float16", False),
    ("mxfp8", 64, "bfloat16", False),
    ("mxfp8", 128, "float16", True),
    ("mxfp4", 96, "float16", False),
    ("mxfp4", 256, "bfloat16", False),
    ("nvfp4", 64, "float16", False),
    ("nvfp4", 128, "bfloat16", False),
    ("turbo4", 96, "bfloat16", False),
    ("turbo4", 128, "float16", True),
    ("turbo3", 64, "bfloat16", False),
    ("turbo3", 256, "float16", False),
]
"""Format, head dimension, element, and whether q and k are normed."""


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers ask the device for its architecture."""
    on_architecture(monkeypatch, "sm_90a")


def on_architecture(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    for module in ("rope", "expand"):
        monkeypatch.setattr(f"kvrelay_kernels.cuda.{module}.device_arch", lambda: arch)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels of this module, each compiled once."""
    return HostKernels(tmp_path_factory.mktemp("kernels"))


class HostArena:
    """One layer of an arena, as the launcher asks for it."""

    def __init__(self, layout: BlockLayout, blocks: int) -> None:
        self.layout = layout
        self.bytes = np.full((blocks, layout.block_bytes), UNTOUCHED, np.uint8)

    def layer_address(self, layer: int) -> int:
        """Where the bytes lie."""
        return self.bytes.ctypes.data


def append(case: AppendCase, kernels: Any) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Rows of q and the layer, as the kernel writes them."""
    batch, spec = case.batch, case.spec
    arena: Any = HostArena(case.layout, case.blocks)
    q = np.full((batch.rows, spec.heads * spec.head_dim), 0xFFFF, np.uint16)
    there = DeviceBatch(
        batch, batch.positions, slots_of(batch), batch.row_starts, batch.lengths, batch.block_tables, None
    )
    qkv = elements(case.qkv, case.element)
    RopeAppend(case.element, kernels)(
        qkv, there, arena, 0, spec, RopeTable(case.cos, case.sin), case.norms, q
    )
    return q, arena.bytes


def expand(case: AppendCase, layer: NDArray[np.uint8], kernels: Any) -> dict[str, NDArray[Any]]:
    """K and V `[blocks, kv_heads, 64, head_dim]` of a layer in 16 bit, the last block cut to 5 tokens."""
    scratch = Scratch(Expansion(case.layout, case.element), len(layer), kernels)
    scratch.blocks = np.full((len(layer), scratch.layout.block_bytes), 0xFF, np.uint8)
    tokens = np.full(len(layer), BLOCK_TOKENS)
    tokens[-1] = 5
    sources = np.stack([np.arange(len(layer))[::-1], tokens], -1).astype(np.int32)
    scratch.fill(layer.ctypes.data, sources)
    found = {}
    for side in "kv":
        frame = scratch.layout.frame(f"{side}_values")
        octets = scratch.blocks[:, frame.offset : frame.offset + frame.nbytes].copy()
        found[side] = octets.view(DTYPES[case.element]).reshape(-1, *frame.shape)
    return found


def stands_for(layer: NDArray[np.uint8], layout: BlockLayout, side: str) -> NDArray[np.float32]:
    """The values of a layer's bytes, in float32."""
    arrays = {}
    for name in layout.format.parts:
        frame = layout.frame(f"{side}_{name}")
        octets = layer[:, frame.offset : frame.offset + frame.nbytes].copy()
        arrays[name] = octets.view(frame.dtype).reshape(-1, *frame.shape)
    if not layout.format.quantized:
        return arrays["values"].astype(np.float32)
    return dequantize(arrays, layout.format)


@pytest.mark.parametrize(("fmt", "dim", "element", "normed"), CASES)
def test_what_is_written_and_read_again(
    kernels: Any, fmt: str, dim: int, element: Element16, normed: bool
) -> None:
    """Without norms the bytes are the definition's; a norm's sum is added up in another order."""
    plain = make_case(np.random.default_rng(), fmt, HEADS[dim], element, *STEP, TURNED[dim], normed)
    case = plain if normed else with_extremes(plain)
    q, layer = append(case, kernels)
    queries, wanted = expected(case)
    assert error(floats(q, element), queries) < UNIT[element]
    same = same_bytes(layer, wanted, case.layout)
    assert same.mean() > 0.999 if normed else same.all()

    found = expand(case, wanted, kernels)
    with np.errstate(over="ignore", invalid="ignore"):
        for side in "kv":
            values = stands_for(wanted[::-1], case.layout, side)
            values[-1, :, 5:] = 0
            rounded = values.astype(DTYPES[element])
            same = found[side].view(np.uint16) == rounded.view(np.uint16)
            assert (same | (np.isnan(found[side]) & np.isnan(rounded))).all()


@pytest.mark.parametrize(("dim", "element"), [(64, "bfloat16"), (256, "float16")])
def test_squares_are_added_up_in_the_order_of_the_definition(
    kernels: Any, dim: int, element: Element16
) -> None:
    """Rows, few among many, whose scale would be another float16 if squares were added up one by one."""
    case = make_case(np.random.default_rng(), "turbo3", HEADS[dim], element, *STEP)
    drawn = np.random.default_rng(0).standard_normal((60000, dim)).astype(DTYPES[element]).astype(np.float32)
    squares = np.square(rotate(drawn))
    one_by_one = np.cumsum(squares, -1, dtype=np.float32)[:, -1]
    while squares.shape[-1] > 1:
        squares = np.add(*np.split(squares, 2, -1))
    found = [np.sqrt(total / dim).astype(np.float16) for total in (squares[:, 0], one_by_one)]
    telling = drawn[found[0] != found[1]]
    values = case.qkv[:, -case.spec.kv_heads :]
    assert len(telling) > 1
    values[:] = np.resize(telling, values.shape)
    assert same_bytes(append(case, kernels)[1], expected(case)[1], case.layout).all()


def test_small_floats_without_an_instruction_for_them(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_architecture(monkeypatch, "sm_80")
    for element in ("float16", "bfloat16"):
        case = with_extremes(make_case(np.random.default_rng(), "mxfp8", HEADS[64], element, *STEP))
        assert same_bytes(append(case, kernels)[1], expected(case)[1], case.layout).all()


@pytest.mark.parametrize("levels", MAGNITUDES)
def test_an_edge_times_a_scale_is_exact(levels: Any) -> None:
    """What lets the kernels compare with products instead of dividing: see `Edges` in `levels.cuh`."""
    scales = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16)
    products = edges_of(levels)[:, None] * scales.astype(np.float32)
    assert (products == edges_of(levels).astype(np.float64)[:, None] * scales.astype(np.float64)).all()
