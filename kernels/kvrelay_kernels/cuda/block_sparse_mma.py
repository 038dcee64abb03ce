"""Launcher of the portable block-sparse prefill kernel (`sources/block_sparse_mma.cu`): from class 8.0 on."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from kvrelay_kernels.block_mask import TILE
from kvrelay_kernels.cuda.block_sparse import LOG2_E, BlockMaps, SparseProblem
from kvrelay_kernels.cuda.block_sparse_work import ITEM_WORDS
from kvrelay_kernels.cuda.device import shared_memory_limit
from kvrelay_kernels.cuda.module import KernelCache, KernelKey, device_arch
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.quant import BLOCK_TOKENS


@dataclass(frozen=True)
class MmaShape:
    """How a thread block is cut."""

    rows: int
    """Queries of a thread block: a tile of the mask, or half of one."""
    warps: int
    slots: int
    """Of the ring through which keys and values pass, 64 keys each."""

    def constants(self, problem: SparseProblem) -> dict[str, int]:
        """Macros of the kernel's source."""
        return problem.constants | {"ROWS": self.rows, "WARPS": self.warps, "SLOTS": self.slots}

    def shared_bytes(self, head_dim: int) -> int:
        """Dynamic shared memory of a thread block; mirrors `sparse_ring.cuh`."""
        panels = -(-head_dim // 64)
        return panels * 128 * (self.rows + self.slots * BLOCK_TOKENS) + 4 * self.slots


SHAPES = {
    64: (MmaShape(TILE, 4, 4),),
    96: (MmaShape(TILE, 4, 3),),
    128: (MmaShape(TILE, 4, 3),),
    256: (MmaShape(TILE, 8, 3), MmaShape(TILE // 2, 4, 2)),
}
"""Of each head dimension, the first that fits. Up to 128 two thread blocks share a multiprocessor."""


def choose_shape(head_dim: int, shared_limit: int) -> MmaShape:
    """The shape where a thread block may have `shared_limit` bytes of shared memory.

    Raises:
        FormatUnsupported: none fits.
    """
    for shape in SHAPES[head_dim]:
        if shape.shared_bytes(head_dim) <= shared_limit:
            return shape
    raise FormatUnsupported(
        f"prefill attention of head dimension {head_dim} needs"
        f" {SHAPES[head_dim][-1].shared_bytes(head_dim)} bytes of shared memory; the GPU has {shared_limit}"
    )


class BlockSparseMma:
    """See `BlockSparse`, whose promises it keeps: the same rows have the same bits in whatever chunk.

    The two kernels add up in different orders, so their bits differ.
    """

    def __init__(self, problem: SparseProblem, kernels: KernelCache, arch: str, shared_limit: int) -> None:
        """`arch` as `device_arch` names it; raises as `choose_shape` and KernelCache.load."""
        self.problem = problem
        self.shape = shape = choose_shape(problem.head_dim, shared_limit)
        self._shared = shape.shared_bytes(problem.head_dim)
        key = KernelKey.of("block_sparse_mma", shape.constants(problem), arch)
        self._kernel = kernels.load(key, self._shared)

    @classmethod
    def here(cls, problem: SparseProblem, kernels: KernelCache) -> Self:
        """For the current device."""
        return cls(problem, kernels, device_arch(), shared_memory_limit())

    def __call__(
        self, q: Any, out: Any, maps: BlockMaps, first_block: int, tables: Any, work: tuple[Any, Any, Any],
        scale: float,
    ) -> None:  # fmt: skip
        """See `BlockSparse.__call__`. Thread blocks start in the order of the work, the longest first."""
        items, entries, low = work
        blocks = items.size // ITEM_WORDS * self.problem.heads * (TILE // self.shape.rows)
        args = (
            q, out, np.uint64(maps.key_address), np.uint64(maps.value_address), tables, items, entries, low,
            np.int32(first_block), np.float32(scale * LOG2_E),
        )  # fmt: skip
        self._kernel((blocks,), (32 * self.shape.warps,), args, shared_mem=self._shared)
