"""What the pass over q, k and v has to write, in NumPy: rows of q, and bytes of the arena's blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.interface import AttentionSpec, StepBatch
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout, levels, parse_format
from kvrelay_kernels.quant.rotation import rotate, run_length
from kvrelay_kernels.reference.backend import ReferenceArena, ReferenceBackend
from model_runtime.steps import sequence_steps
from tests.gpu.paged_cache import DTYPES

UNTOUCHED = 0xA5
CONTEXT = 512
REFERENCE: Any = ReferenceBackend()


@dataclass(frozen=True)
class AppendCase:
    """A step's inputs; its blocks lie anywhere."""

    batch: StepBatch
    blocks: int
    layout: BlockLayout
    spec: AttentionSpec
    element: Element16
    qkv: NDArray[np.float32]
    """`[rows, heads of q, k and v, head_dim]`, which 16 bit hold exactly."""
    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    norms: tuple[NDArray[np.float32], NDArray[np.float32], float] | None


def make_case(
    rng: np.random.Generator,
    fmt: str,
    heads: tuple[int, int, int],
    element: Element16,
    new: Sequence[int],
    past: Sequence[int],
    turned: int | None = None,
    normed: bool = False,
) -> AppendCase:
    """Standard normal rows. `heads`: of q, of K and V, and their dimension; `turned` elements are roped."""
    total, kv_heads, dim = heads
    layout = BlockLayout(parse_format(fmt, dim, element), kv_heads, dim)
    batch, blocks = sequence_steps(new, past)
    blocks += 2
    tables = rng.permutation(blocks).astype(np.int32)[batch.block_tables]
    angles = rng.uniform(-3, 3, (CONTEXT, (turned or dim) // 2))
    weights = rng.uniform(0.5, 1.5, (2, dim)).astype(np.float32)
    qkv = rng.standard_normal((batch.rows, total + 2 * kv_heads, dim))
    spec = AttentionSpec(total, kv_heads, dim, 0.1)
    return AppendCase(
        replace(batch, block_tables=tables), blocks, layout, spec, element,
        qkv.astype(DTYPES[element]).astype(np.float32), np.cos(angles).astype(np.float32),
        np.sin(angles).astype(np.float32), (weights[0], weights[1], 1e-6) if normed else None,
    )  # fmt: skip


def with_extremes(case: AppendCase) -> AppendCase:
    """The case with some heads of k and v that are hard to code: constants, ties, NaN, infinity."""
    dim = case.spec.head_dim
    signs = np.where(np.arange(dim) % 3, 1.0, -1.0)
    ties = [6, *levels.edges_of("e2m1").tolist()]
    small_ties = [448, 1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10, 2.0**-6 - 2.0**-10, 0.0, 2.0**-12]
    spoilt = np.resize([1.0, 2.0, 3.0], (4, dim))
    spoilt[[0, 1, 2, 3, 3], [3, dim - 1, 20, 1, 40]] = [np.nan, np.inf, -np.inf, np.inf, -np.inf]
    run = run_length(dim)
    nearly_zero = np.where(np.arange(dim) % run < run // 2, 0.0, 60000.0)
    nearly_zero[::run] = -1e-40  # rotated, most elements are that alone: divided by the scale, they are zero
    rows = [
        np.zeros(dim), -np.zeros(dim), np.full(dim, 0.25), 60000 * signs, np.linspace(-1e-6, 1e-6, dim),
        np.linspace(1000, 1001, dim), np.resize(ties, dim) * signs, np.resize(small_ties, dim) * signs,
        np.resize([1e-7, 0, 60000, -3e-8], dim), 3e38 * signs, np.resize([1e30, 1e-40], dim) * signs,
        2e-40 * signs, nearly_zero, *spoilt,
    ]  # fmt: skip
    qkv = case.qkv.copy()
    stored = qkv[:, case.spec.heads :]
    with np.errstate(over="ignore"):
        for number, values in enumerate(rows):
            row, head = divmod(2 * number, stored.shape[1])
            for side in (0, case.spec.kv_heads):
                at = row % len(stored), (head + side) % stored.shape[1]
                stored[at] = values.astype(DTYPES[case.element]).astype(np.float32)
    return replace(case, qkv=qkv)


def rope(x: NDArray[np.float32], cos: NDArray[np.float32], sin: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rope in float32, product by product, as the kernel rounds."""
    a, b, rest = np.split(x, [cos.shape[-1], 2 * cos.shape[-1]], -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1, dtype=np.float32)


def expected(case: AppendCase) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """q `[rows, heads * head_dim]` before it is rounded, and a layer `[blocks, block_bytes]`."""
    spec, batch, at = case.spec, case.batch, case.batch.positions
    queries, keys, values = np.split(case.qkv, [spec.heads, spec.heads + spec.kv_heads], 1)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if case.norms is not None:
            queries, keys = (
                REFERENCE.rms_norm(x.astype(np.float64), weight, case.norms[2]).astype(np.float32)
                for x, weight in zip((queries, keys), case.norms[:2], strict=True)
            )
        queries, keys = (rope(x, case.cos[at][:, None], case.sin[at][:, None]) for x in (queries, keys))
        if case.layout.format.quantized:
            queries, keys = rotate(queries), rotate(keys)
        arena: Any = ReferenceArena(case.layout, 1, case.blocks)
        for block in range(case.blocks):
            arena.write_block(0, block, memoryview(bytes([UNTOUCHED]) * case.layout.block_bytes))
        sequence = np.repeat(np.arange(batch.sequences), np.diff(batch.row_starts))
        blocks, tokens = batch.block_tables[sequence, at // BLOCK_TOKENS], at % BLOCK_TOKENS
        arena.put(0, blocks, tokens, "k", keys)
        arena.put(0, blocks, tokens, "v", values)
    written = [np.frombuffer(arena.read_block(0, block), np.uint8) for block in range(case.blocks)]
    return queries.reshape(batch.rows, -1), np.stack(written)


def same_bytes(found: NDArray[np.uint8], wanted: NDArray[np.uint8], layout: BlockLayout) -> NDArray[np.bool_]:
    """Which bytes of a layer are equal; of scales and biases, the numbers: which NaN it is, and which of
    two zeros is the least one, are nobody's choice."""
    same = found == wanted
    for frame in layout.frames:
        if frame.dtype.startswith("uint"):
            continue
        there = slice(frame.offset, frame.offset + frame.nbytes)
        ours, theirs = (side[:, there].copy().view(frame.dtype) for side in (found, wanted))
        same[:, there] = np.repeat((ours == theirs) | (np.isnan(ours) & np.isnan(theirs)), 2, -1)
    return same


def differences(found: NDArray[np.uint8], wanted: NDArray[np.uint8], layout: BlockLayout) -> list[str]:
    """The first bytes of a layer that are not equal, and in which frame of their block."""
    apart = np.argwhere(~same_bytes(found, wanted, layout))
    told: list[str] = []
    for block, at in apart[:8]:
        frame = max((frame for frame in layout.frames if frame.offset <= at), key=lambda frame: frame.offset)
        told.append(
            f"block {block}, {frame} + {at - frame.offset}: {found[block, at]}, not {wanted[block, at]}"
        )
    return told
