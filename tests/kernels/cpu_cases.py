"""Random steps over a cache, run on the CPU backend and on the reference."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cpu.backend import CpuBackend
from kvrelay_kernels.interface import AttentionSpec, RopeTable, StepBatch
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout, parse_format
from kvrelay_kernels.reference.backend import ReferenceBackend

CONTEXT = 512


def relative(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Largest error in units of the largest value; NaN counts as infinite."""
    assert found.shape == wanted.shape
    error = float(np.max(np.abs(found - wanted), initial=0.0)) / float(np.max(np.abs(wanted), initial=1e-30))
    return error if np.isfinite(error) else float("inf")


def make_batch(lengths: list[int], new: list[int], tables: NDArray[np.int32]) -> StepBatch:
    """A step in which sequence s brings `new[s]` rows and then holds `lengths[s]` keys."""
    starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, new, strict=True)]).astype(
        np.int32
    )
    ids = np.zeros(len(positions), np.int32)
    return StepBatch(ids, positions, starts, np.array(lengths, np.int32), tables, starts[1:] - np.int32(1))


@dataclass(frozen=True)
class Case:
    """A cache format with a shape of attention."""

    kv_format: str
    head_dim: int
    heads: int
    kv_heads: int
    window: int | None = None
    rotated: int | None = None

    @property
    def spec(self) -> AttentionSpec:
        """The same for the backends."""
        return AttentionSpec(self.heads, self.kv_heads, self.head_dim, self.head_dim**-0.5, self.window)

    @property
    def layout(self) -> BlockLayout:
        """The blocks' layout."""
        return BlockLayout(parse_format(self.kv_format, self.head_dim), self.kv_heads, self.head_dim)

    @property
    def width(self) -> int:
        """Columns of q, k and v together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


class Run:
    """One backend with a cache of NaN bytes, of which only written tokens may be read."""

    layer = 1

    def __init__(self, backend: CpuBackend | ReferenceBackend, case: Case, blocks: int, seed: int) -> None:
        self.backend: Any = backend
        self.case = case
        self.arena: Any = self.backend.new_arena(case.layout, 2, blocks)
        for block in range(blocks):
            self.arena.write_block(self.layer, block, memoryview(b"\xff" * case.layout.block_bytes))
        rng = np.random.default_rng(seed)
        angles = rng.uniform(-3, 3, (CONTEXT, (case.rotated or case.head_dim) // 2))
        self.rope = RopeTable(
            *(self.backend.load_array(side(angles).astype(np.float32)) for side in (np.cos, np.sin))
        )
        weights = [
            self.backend.load_array(rng.uniform(0.5, 1.5, case.head_dim).astype(np.float32)) for _ in "qk"
        ]
        self.norms = (weights[0], weights[1], 1e-6)

    def step(self, qkv: NDArray[np.float32], batch: StepBatch) -> tuple[NDArray[Any], NDArray[Any]]:
        """q and the attention's result."""
        args = batch, self.arena, self.layer, self.case.spec
        q = self.backend.rope_append(self.backend.load_array(qkv), *args, self.rope, self.norms)
        return q, self.backend.attention(q, *args)


def make_tables(lengths: list[int], rng: np.random.Generator) -> tuple[NDArray[np.int32], int]:
    """Shuffled blocks for each sequence, and how many there are."""
    most = -(-max(lengths) // BLOCK_TOKENS)
    count = len(lengths) * most
    return rng.permutation(count).astype(np.int32).reshape(len(lengths), most), count
