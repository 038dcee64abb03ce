"""The MLX backend against the definitions in NumPy and the reference backend, at small shapes."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import AttentionSpec, RopeTable, StepBatch, WeightMode
from kvrelay_kernels.mlx import codec as mlx_codec
from kvrelay_kernels.mlx.backend import MlxBackend
from kvrelay_kernels.mlx.linear import AffineLinear, FloatLinear
from kvrelay_kernels.quant import AffineWeight, BlockLayout, codec, parse_format
from kvrelay_kernels.quant.formats import SCHEMES
from kvrelay_kernels.quant.weights import quantize_scaled, quantize_weight
from kvrelay_kernels.reference.backend import ReferenceBackend
from model_runtime.catalog import default_cache_dir, resolve
from model_runtime.checkpoint import load_model
from model_runtime.decoder import Decoder
from model_runtime.steps import sequence_steps

FORMATS = ["none", *SCHEMES, "int8-g32", "int4-g32"]
CONTEXT = 512
FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture
def backend() -> MlxBackend:
    """MLX on its CPU build, in float32."""
    return MlxBackend()


def host(array: Any) -> NDArray[np.float32]:
    return np.array(array.astype(mx.float32))


def normal(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6), name=st.sampled_from(FORMATS[1:]), spread=st.sampled_from([0, 1e-6, 1, 1e4])
)
def test_codes_have_the_bytes_of_the_definition(seed: int, name: str, spread: float) -> None:
    fmt = parse_format(name, 128)
    # Adding 0 makes -0 to 0: which zero is the smaller one, libraries see differently.
    values = normal((3, 2, 128), seed) * np.float32(spread) + np.float32(0)
    if spread == 1:
        values[0, 0, 3], values[1, 1, 100] = np.nan, -np.inf
    found, wanted = mlx_codec.quantize(mx.array(values), fmt), codec.quantize(values, fmt)
    assert found.keys() == wanted.keys()
    for part, array in found.items():
        same = np.array(array) == wanted[part]
        assert (same | np.isnan(wanted[part])).all(), part
    np.testing.assert_array_equal(host(mlx_codec.dequantize(found, fmt)), codec.dequantize(wanted, fmt))


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_come_and_go_as_they_are(name: str, backend: MlxBackend) -> None:
    layout = BlockLayout(parse_format(name, 64), 2, 64)
    arena = backend.new_arena(layout, 2, 3)
    payload = np.zeros(layout.block_bytes, np.uint8)
    for frame in layout.frames:
        halves = normal((frame.nbytes // 2,), 7).astype(np.float16).view(np.uint8)
        payload[frame.offset : frame.offset + frame.nbytes] = halves
    before = bytes(arena.read_block(1, 1))
    arena.write_block(1, 2, memoryview(payload.tobytes()))
    assert bytes(arena.read_block(1, 2)) == payload.tobytes()
    assert bytes(arena.read_block(1, 1)) == before
    assert not any(bytes(arena.read_block(0, 2)))
    with pytest.raises(ValueError, match="bytes"):
        arena.write_block(0, 0, memoryview(b"short"))


def test_bfloat16_blocks_come_and_go() -> None:
    backend = MlxBackend(element="bfloat16")
    layout = BlockLayout(parse_format("none", 64, "bfloat16"), 1, 64)
    arena = backend.new_arena(layout, 1, 1)
    payload = normal((layout.block_bytes // 4,)).tobytes()
    arena.write_block(0, 0, memoryview(payload))
    assert bytes(arena.read_block(0, 0)) == payload


def make_step(lengths: list[int], new: list[int], seed: int) -> tuple[StepBatch, int]:
    """A step over shuffled blocks."""
    batch, blocks = sequence_steps(new, [length - count for length, count in zip(lengths, new, strict=True)])
    order = np.random.default_rng(seed).permutation(blocks).astype(np.int32)
    return StepBatch(
        batch.token_ids,
        batch.positions,
        batch.row_starts,
        batch.lengths,
        order[batch.block_tables],
        batch.logit_rows,
    ), blocks


CASES = [
    ([64], [64]),
    ([130], [130]),
    ([200], [7]),
    ([1, 65, 130], [1, 1, 1]),
    ([70, 3, 150], [70, 3, 20]),
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("window", [None, 40, 100])
@pytest.mark.parametrize(("lengths", "new"), CASES)
def test_attention_is_the_references(
    name: str, window: int | None, lengths: list[int], new: list[int], backend: MlxBackend
) -> None:
    spec = AttentionSpec(heads=4, kv_heads=2, head_dim=64, scale=0.125, window=window)
    layout = BlockLayout(parse_format(name, 64), 2, 64)
    past = [length - count for length, count in zip(lengths, new, strict=True)]
    results: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    for judge in (ReferenceBackend(), backend):
        anything: Any = judge
        final, blocks = make_step(lengths, new, seed=3)
        arena = anything.new_arena(layout, 2, blocks)
        for block in range(blocks):
            # Garbage, NaN where it is read as floats: only what was written may be read.
            arena.write_block(1, block, memoryview(b"\xff" * layout.block_bytes))
        angles = np.random.default_rng(1).uniform(-3, 3, (CONTEXT, 32)).astype(np.float32)
        rope = RopeTable(*(anything.load_array(side(angles)) for side in (np.cos, np.sin)))
        norms = (anything.load_array(normal((64,), 5)), anything.load_array(normal((64,), 6)), 1e-6)
        if any(past):
            earlier = [count for count in past if count]
            rows = np.flatnonzero(past)
            batch, _ = sequence_steps(earlier, [0] * len(earlier))
            batch = StepBatch(
                *(batch.token_ids, batch.positions, batch.row_starts, batch.lengths),
                final.block_tables[rows],
                batch.logit_rows,
            )
            qkv = anything.load_array(normal((batch.rows, 8 * 64), 8))
            anything.rope_append(qkv, batch, arena, 1, spec, rope, norms)
        qkv = anything.load_array(normal((final.rows, 8 * 64), 9))
        q = anything.rope_append(qkv, final, arena, 1, spec, rope, norms)
        out = anything.attention(q, final, arena, 1, spec)
        results.append((np.asarray(q, np.float32), np.asarray(out, np.float32)))
    (q_expected, expected), (q_found, found) = results
    np.testing.assert_allclose(q_found, q_expected, atol=1e-5)
    # A key whose rounding falls to the other side moves by one step of its code.
    np.testing.assert_allclose(found, expected, atol=1e-5 if name == "none" else 2e-2)


def test_blocks_before_the_window_are_not_gathered(backend: MlxBackend) -> None:
    spec = AttentionSpec(4, 2, 64, 0.125, window=64)
    batch, blocks = make_step([640], [1], seed=0)
    arena = backend.new_arena(BlockLayout(parse_format("int8", 64), 2, 64), 1, blocks)
    backend.attention(mx.zeros((1, 256)), batch, arena, 0, spec)
    assert (backend.counts.computed, backend.counts.skipped) == (1, 9)


def weights(kind: str) -> tuple[list[Any], NDArray[np.float32]]:
    """Two parts of a matrix `[48, 128]`, and what it is."""
    values = [normal((32, 128), 1), normal((16, 128), 2)]
    if kind == "float":
        return list(values), np.concatenate(values)
    if kind == "fp8":
        small = [quantize_scaled(part) for part in values]
        return list(small), np.concatenate([part.dequantize() for part in small])
    bits, group = {"int8": (8, 32), "int4": (4, 32), "mixed": (4, 64), "group16": (8, 16)}[kind]
    parts = [quantize_weight(values[0], bits, group), quantize_weight(values[1], 8, min(group, 32))]
    return list(parts), np.concatenate([part.dequantize() for part in parts])


@pytest.mark.parametrize("kind", ["float", "int8", "int4", "mixed", "group16", "fp8"])
@pytest.mark.parametrize("mode", ["auto", "float", "int8", "int4", "fp8"])
def test_products_and_rows(kind: str, mode: WeightMode, backend: MlxBackend) -> None:
    parts, exact = weights(kind)
    bias = normal((48,), 3)
    linear = backend.load_linear(parts, mode, bias)
    x = normal((5, 128), 4)
    lossy = mode in ("int8", "int4", "fp8")
    atol = {"int8": 0.4, "int4": 6.0, "fp8": 2.0}.get(mode, 1e-4)
    np.testing.assert_allclose(host(backend.linear(mx.array(x), linear)), x @ exact.T + bias, atol=atol)
    ids = np.array([3, 40, 3], np.int32)
    rows = host(backend.embed(linear, ids, 2.0))
    np.testing.assert_allclose(rows, exact[ids] * 2, atol=0.6 if lossy else 1e-5)
    logits = backend.logits(mx.array(x), backend.load_linear(parts, mode), np.array([4, 0], np.int32))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, x[[4, 0]] @ exact.T, atol=atol)


def test_codes_of_a_file_are_kept(backend: MlxBackend) -> None:
    part = quantize_weight(normal((8, 64)), 4, 32)
    linear = backend.load_linear([part], "auto")
    assert isinstance(linear, AffineLinear)
    assert (linear.bits, linear.group) == (4, 32)
    group_16: AffineWeight = quantize_weight(normal((8, 64)), 8, 16)
    assert isinstance(backend.load_linear([group_16], "auto"), FloatLinear)
    assert isinstance(backend.load_linear([quantize_scaled(normal((8, 64)))], "auto"), FloatLinear)
    with pytest.raises(FormatUnsupported, match="48 columns"):
        backend.load_linear([normal((8, 48))], "int8")


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_rows_of_elements(activation: Any, backend: MlxBackend) -> None:
    reference: Any = ReferenceBackend()
    x, weight = normal((6, 64), 1), normal((64,), 2)
    gate, up = normal((48, 64), 3), normal((48, 64), 4)
    found = host(backend.gated_linear(mx.array(x), backend.load_gated(gate, up, "auto"), activation))
    wanted = reference.gated_linear(x, reference.load_gated(gate, up, "auto"), activation)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    normed = host(backend.rms_norm(mx.array(x), backend.load_array(weight), 1e-6))
    np.testing.assert_allclose(normed, reference.rms_norm(x, weight, 1e-6), atol=1e-5)
    summed, normed = backend.add_rms_norm(mx.array(x), mx.array(x), backend.load_array(weight), 1e-6)
    np.testing.assert_array_equal(host(summed), x + x)
    np.testing.assert_allclose(host(normed), reference.rms_norm(x + x, weight, 1e-6), atol=1e-5)


@pytest.mark.parametrize("kv_format", ["none", "int8"])
def test_a_few_tokens_of_a_real_model(kv_format: str) -> None:
    """SmolLM2 as the file has it; MLX's CPU build reads about 6 tokens a second."""
    case = next(
        case
        for case in json.loads((FIXTURES / "smollm2_greedy.json").read_text())["cases"]
        if case["name"] == "capital"
    )
    checkpoint = load_model(resolve("smollm2"), default_cache_dir())
    decoder = Decoder(checkpoint, MlxBackend(), "auto", context=256)
    arena = decoder.new_arena(1, kv_format)
    pending, past, answer = case["prompt_token_ids"], 0, list[int]()
    for _ in range(4):
        batch, _ = sequence_steps([len(pending)], [past], pending)
        past += len(pending)
        answer.append(int(decoder.forward(batch, arena)[0].argmax()))
        pending = answer[-1:]
    assert answer == case["token_ids"][:4]
