"""The CUDA kernels that work on rows, run on this processor, against the reference and quant/'s bytes."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cuda.batch import DeviceBatch, slots_of
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.rope import RopeAppend
from kvrelay_kernels.cuda.rows import RowKernels
from kvrelay_kernels.cuda.weights import convert_key
from kvrelay_kernels.interface import Activation, AttentionSpec, RopeTable
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout, parse_format
from kvrelay_kernels.quant.affine import quantize
from kvrelay_kernels.quant.rotation import rotate
from kvrelay_kernels.quant.weights import quantize_weight
from kvrelay_kernels.reference.backend import ReferenceBackend
from model_runtime.steps import sequence_steps
from tests.kernels.host_kernels import COMPILER, HostKernels

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
REFERENCE: Any = ReferenceBackend()


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers ask the device for its architecture."""
    for module in ("rows", "rope"):
        monkeypatch.setattr(f"kvrelay_kernels.cuda.{module}.device_arch", lambda: "sm_90a")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels of this module, each compiled once."""
    return HostKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(params=["float16", "bfloat16"])
def element(request: pytest.FixtureRequest) -> Element16:
    """Both element types."""
    return request.param


def elements(values: NDArray[Any], element: str) -> NDArray[np.uint16]:
    return values.astype(DTYPES[element]).view(np.uint16)


def floats(found: NDArray[Any], element: str) -> NDArray[np.float32]:
    return found.view(DTYPES[element]).astype(np.float32)


def error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    size = float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted))
    return size if np.isfinite(size) else float("inf")


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
    RowKernels(element, kernels).gate(there, activation, out)
    wanted = REFERENCE.gate(floats(there, element).astype(np.float64), activation)
    assert error(floats(out, element), wanted) < UNIT[element]


def test_rows_by_number(kernels: Any, element: Element16) -> None:
    rows, rng = RowKernels(element, kernels), np.random.default_rng(2)
    table = elements(rng.standard_normal((9, 136)), element)
    ids = np.array([8, 0, 8, 3], np.int32)
    out = np.full((4, 136), np.nan, np.float32)
    rows.embed(table, ids, 2.5, out)
    assert np.array_equal(out, floats(table, element)[ids] * np.float32(2.5))
    some = np.zeros((4, 136), np.uint16)
    rows.gather(table, ids, some)
    assert np.array_equal(some, table[ids])
    order, back = np.array([2, 0, 3, 1], np.int32), np.zeros((4, 136), np.uint16)
    rows.scatter(some, order, back)
    assert np.array_equal(back[order], some)


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


class HostArena:
    """One layer of an arena, as the launcher asks for it."""

    def __init__(self, layout: BlockLayout, blocks: int) -> None:
        self.layout = layout
        self.bytes = np.full((blocks, layout.block_bytes), 0xA5, np.uint8)

    def layer_address(self, layer: int) -> int:
        """Where the bytes lie."""
        return self.bytes.ctypes.data


def turned(x: NDArray[np.float32], cos: NDArray[np.float32], sin: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rope in float32, product by product, as the kernel rounds."""
    half = cos.shape[-1]
    a, b, rest = np.split(x, [half, 2 * half], -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1, dtype=np.float32)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("fmt", "heads", "kv_heads", "dim", "rotated"),
    [
        ("none", 32, 8, 128, 128),
        ("int8-g64", 9, 3, 64, 64),
        ("int8-g32", 12, 4, 96, 32),
        ("int4-g64", 32, 8, 128, 128),
        ("int4-g32", 4, 1, 256, 256),
    ],
)
def test_append(
    kernels: Any,
    element: Element16,
    fmt: str,
    heads: int,
    kv_heads: int,
    dim: int,
    rotated: int,
    normed: bool,
) -> None:
    """Without norms the bytes are the definition's; a norm's sum is added up in another order."""
    rng = np.random.default_rng(dim)
    layout = BlockLayout(parse_format(fmt, dim, element), kv_heads, dim)
    batch, blocks = sequence_steps([6, 1], [60, 130])
    batch.block_tables[:] = rng.permutation(blocks).astype(np.int32)[batch.block_tables]
    arena: Any = HostArena(layout, blocks)
    angles = rng.uniform(-3, 3, (256, rotated // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    weights = rng.uniform(0.5, 1.5, (2, dim)).astype(np.float32)
    qkv = elements(rng.standard_normal((batch.rows, (heads + 2 * kv_heads) * dim)), element)
    q = np.full((batch.rows, heads * dim), 0xFFFF, np.uint16)
    there = DeviceBatch(
        batch, batch.positions, slots_of(batch), batch.row_starts, batch.lengths, batch.block_tables, None
    )
    spec = AttentionSpec(heads, kv_heads, dim, 0.1)
    norms = (weights[0], weights[1], 1e-6) if normed else None
    RopeAppend(element, kernels)(qkv, there, arena, 0, spec, RopeTable(cos, sin), norms, q)

    parts = floats(qkv, element).reshape(batch.rows, -1, dim)
    queries, keys, values = np.split(parts, [heads, heads + kv_heads], 1)
    if norms is not None:
        queries, keys = (
            REFERENCE.rms_norm(x.astype(np.float64), weight, norms[2]).astype(np.float32)
            for x, weight in zip((queries, keys), weights, strict=True)
        )
    at = batch.positions
    queries, keys = (turned(x, cos[at][:, None], sin[at][:, None]) for x in (queries, keys))
    if layout.format.quantized:
        queries, keys = rotate(queries), rotate(keys)
    assert error(floats(q, element), queries.reshape(batch.rows, -1)) < UNIT[element]

    wanted = np.full_like(arena.bytes, 0xA5)
    sequence = np.repeat(np.arange(batch.sequences), np.diff(batch.row_starts))
    place = batch.block_tables[sequence, at // BLOCK_TOKENS], slice(None), at % BLOCK_TOKENS
    for side, vectors in (("k", keys), ("v", values)):
        stored: dict[str, Any] = {"values": vectors.astype(DTYPES[element])}
        if layout.format.quantized:
            stored = dict(zip(("codes", "scales", "biases"), quantize(vectors, layout.format), strict=True))
        for name, array in stored.items():
            frame = layout.frame(f"{side}_{name}")
            view = wanted[:, frame.offset : frame.offset + frame.nbytes]
            view.reshape(blocks, kv_heads, BLOCK_TOKENS, -1)[place] = np.ascontiguousarray(array).view(
                np.uint8
            )
    same = float((arena.bytes == wanted).mean())
    assert same > 0.999 if normed else same == 1.0
