"""The pass over q, k and v: the bytes of quant/affine.py for the same float32 inputs."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.interface import AttentionSpec, RopeTable, StepBatch
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout, parse_format
from kvrelay_kernels.quant.affine import quantize
from kvrelay_kernels.quant.rotation import rotate
from kvrelay_kernels.reference.backend import ReferenceArena, ReferenceBackend
from model_runtime.steps import sequence_steps
from tests.gpu.paged_cache import DTYPES
from tests.gpu.poisoned import UNIT, error, poisoned, rounded, to_device, to_host

FORMATS = ["none", "int8-g64", "int8-g32", "int4-g64", "int4-g32"]
HEADS = {64: (9, 3), 96: (12, 4), 128: (32, 8), 256: (4, 1)}
REFERENCE: Any = ReferenceBackend()
CONTEXT = 512


def scattered(rng: np.random.Generator, new: list[int], past: list[int]) -> tuple[StepBatch, int]:
    """A step whose blocks lie anywhere."""
    batch, blocks = sequence_steps(new, past)
    order = rng.permutation(blocks + 2).astype(np.int32)
    return StepBatch(
        batch.token_ids, batch.positions, batch.row_starts, batch.lengths, order[batch.block_tables],
        batch.logit_rows,
    ), blocks + 2  # fmt: skip


def turned(x: NDArray[np.float32], cos: NDArray[np.float32], sin: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rope in float32, product by product, as the kernel rounds."""
    half = cos.shape[-1]
    a, b, rest = np.split(x, [half, 2 * half], -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1, dtype=np.float32)


@pytest.mark.parametrize("head_dim", HEADS)
@pytest.mark.parametrize("element", ["float16", "bfloat16"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("partial", [False, True])
def test_append(cupy: Any, fmt: str, element: Element16, head_dim: int, normed: bool, partial: bool) -> None:
    if head_dim == 96 and fmt.endswith("g64"):
        pytest.skip("a group of 64 does not divide 96")
    heads, kv_heads = HEADS[head_dim]
    rng = np.random.default_rng(head_dim)
    backend = poisoned(element)
    layout = BlockLayout(parse_format(fmt, head_dim, element), kv_heads, head_dim)
    spec = AttentionSpec(heads, kv_heads, head_dim, 0.1)
    batch, blocks = scattered(rng, [70, 1, 64, 33], [0, 130, 64, 31])
    arena = backend.new_arena(layout, 2, blocks)
    arena.bytes.fill(0xA5)
    half = (32 if partial else head_dim) // 2
    angles = rng.uniform(-3, 3, (CONTEXT, half))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    rope = RopeTable(backend.load_array(cos), backend.load_array(sin))
    weights = rng.uniform(0.5, 1.5, (2, head_dim)).astype(np.float32)
    norms = (weights[0], weights[1], 1e-6) if normed else None
    there = (backend.load_array(weights[0]), backend.load_array(weights[1]), 1e-6) if normed else None
    qkv = rounded(rng.standard_normal((batch.rows, (heads + 2 * kv_heads) * head_dim)), element)
    q = backend.rope_append(to_device(qkv, element), batch, arena, 1, spec, rope, there)

    parts = qkv.reshape(batch.rows, -1, head_dim)
    queries, keys, values = np.split(parts, [heads, heads + kv_heads], 1)
    if norms:
        queries, keys = (
            REFERENCE.rms_norm(x.astype(np.float64), w, norms[2]).astype(np.float32)
            for x, w in zip((queries, keys), norms[:2], strict=True)
        )
    at = batch.positions
    queries, keys = (turned(x, cos[at][:, None], sin[at][:, None]) for x in (queries, keys))
    if layout.format.quantized:
        queries, keys = rotate(queries), rotate(keys)
    assert error(to_host(q, element), queries.reshape(batch.rows, -1)) < UNIT[element]

    found = arena.bytes.get()
    assert (found[0] == 0xA5).all()
    wanted = np.full_like(found[1], 0xA5)
    sequence = np.repeat(np.arange(batch.sequences), np.diff(batch.row_starts))
    place = batch.block_tables[sequence, at // BLOCK_TOKENS], slice(None), at % BLOCK_TOKENS
    for side, vectors in (("k", keys), ("v", values)):
        stored: dict[str, Any] = {"values": vectors.astype(DTYPES[element])}
        if layout.format.quantized:
            stored = dict(zip(("codes", "scales", "biases"), quantize(vectors, layout.format), strict=True))
        for name, array in stored.items():
            frame = layout.frame(f"{side}_{name}")
            octets = np.ascontiguousarray(array).view(np.uint8)
            view = wanted[:, frame.offset : frame.offset + frame.nbytes].reshape(
                blocks, kv_heads, BLOCK_TOKENS, -1
            )
            view[place] = octets
    if not normed:
        assert np.array_equal(found[1], wanted)
        return
    # A norm's sum of squares is added up in another order: a code may fall to the other side of a rounding.
    ours, theirs = (ReferenceArena(layout, 1, blocks) for _ in range(2))
    for arena_of, octets in ((ours, found[1]), (theirs, wanted)):
        for block in range(blocks):
            arena_of.write_block(0, block, memoryview(octets[block].tobytes()))
    for s in range(batch.sequences):
        new = slice(int(at[batch.row_starts[s]]), int(batch.lengths[s]))
        for side in "kv":
            a, b = (
                x.get(0, batch.block_tables[s], int(batch.lengths[s]), side)[:, new] for x in (ours, theirs)
            )
            assert error(a, b) < {0: 2 * UNIT[element], 8: 2e-3, 4: 2e-2}[layout.format.bits]
    assert (found[1] == wanted).mean() > 0.95


def test_constant_and_extreme_groups_have_the_bytes_of_the_definition(cupy: Any) -> None:
    """Scale 0, a scale that is a subnormal half, and ranges beyond what a half holds."""
    layout = BlockLayout(parse_format("int8-g32", 64, "float16"), 1, 64)
    spec = AttentionSpec(1, 1, 64, 0.1)
    backend = poisoned("float16")
    values = np.zeros((4, 64), np.float32)
    values[0] = 0.25
    values[1] = np.linspace(-1e-6, 1e-6, 64)
    values[2, ::2] = 60000
    values[2, 1::2] = -60000
    values[3] = np.linspace(1000, 1001, 64)
    values = rounded(values, "float16")
    batch, blocks = sequence_steps([4], [0])
    arena = backend.new_arena(layout, 1, blocks)
    flat = backend.load_array(np.ones((8, 32), np.float32)), backend.load_array(np.zeros((8, 32), np.float32))
    qkv = np.concatenate([values, values, values], 1)
    backend.rope_append(to_device(qkv, "float16"), batch, arena, 0, spec, RopeTable(*flat), None)
    found = arena.bytes.get()[0, 0]
    for side, stored in (("k", rotate(values)), ("v", values)):
        for name, array in zip(("codes", "scales", "biases"), quantize(stored, layout.format), strict=True):
            frame = layout.frame(f"{side}_{name}")
            rows = found[frame.offset : frame.offset + frame.nbytes].reshape(BLOCK_TOKENS, -1)[:4]
            assert np.array_equal(rows, np.ascontiguousarray(array).view(np.uint8)), (side, name)
