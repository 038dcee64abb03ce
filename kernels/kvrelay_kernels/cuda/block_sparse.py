"""Launcher of the block-sparse prefill kernel (`sources/block_sparse.cu`): Hopper only."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from kvrelay_kernels.cuda.block_sparse_work import ITEM_WORDS
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.module import KernelCache, KernelKey, device_arch
from kvrelay_kernels.cuda.tensor_map import block_map
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout

HEAD_DIMS = (64, 96, 128, 256)
THREADS = 384
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class SparseProblem:
    """What a kernel is compiled for."""

    heads: int
    kv_heads: int
    head_dim: int
    element: Element16
    """Type of queries, keys, values and output."""

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            raise FormatUnsupported(
                f"prefill attention runs head dimensions {HEAD_DIMS}, not {self.head_dim}"
            )
        if self.heads % self.kv_heads:
            raise FormatUnsupported(f"{self.heads} heads cannot share {self.kv_heads} KV heads")

    @property
    def constants(self) -> dict[str, int]:
        """Macros of the kernel's source."""
        return {
            "HEADS": self.heads,
            "KV_HEADS": self.kv_heads,
            "HEAD_DIM": self.head_dim,
            "BFLOAT": int(self.element == "bfloat16"),
        }

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a thread block; mirrors `sparse_shape.cuh`."""
        panels = -(-self.head_dim // 64)
        step = 64 if self.head_dim > 128 else 128
        stages = 2 + 3 if self.head_dim > 64 else 4 + 4
        slots = 1 if self.head_dim > 128 else 2
        return panels * 128 * (slots * 128 + stages * step) + 2048


class BlockMaps:
    """Keys and values of 16-bit blocks: where they lie, and how Hopper's copy engine sees them."""

    def __init__(self, layout: BlockLayout, address: int, blocks: int) -> None:
        """`blocks` blocks of an unquantized `layout` behind each other, from `address` on."""
        self._layout, self._blocks = layout, blocks
        self.key_address = address + layout.frame("k_values").offset
        self.value_address = address + layout.frame("v_values").offset

    @cached_property
    def keys(self) -> Any:
        """The tensor map of the keys. Raises KernelError where the driver refuses."""
        return self._map(self.key_address)

    @cached_property
    def values(self) -> Any:
        """As `keys`."""
        return self._map(self.value_address)

    def _map(self, address: int) -> Any:
        shape = (self._layout.kv_heads, BLOCK_TOKENS, self._layout.head_dim)
        return block_map(address, self._blocks, self._layout.block_bytes, shape)


class BlockSparse:
    """Attention of prompts' rows over listed tiles of a paged 16-bit cache.

    Same input, same bits; and a row has the same bits in whatever chunk of its prompt it comes. Calls of one
    instance follow each other on one stream.
    """

    def __init__(
        self, problem: SparseProblem, kernels: KernelCache, arch: str, processors: int, counter: Any
    ) -> None:
        """`arch` as `device_arch` names it; `counter`, one zero of uint32 on the device, is this instance's.

        Raises FormatUnsupported where the device is no Hopper, and as KernelCache.load.
        """
        if arch != "sm_90a":
            raise FormatUnsupported(
                f"the block-sparse prefill kernel runs on compute capability 9.0, not {arch}"
            )
        self.problem = problem
        self._kernel = kernels.load(
            KernelKey.of("block_sparse", problem.constants, arch), problem.shared_bytes
        )
        self._processors, self._counter = processors, counter

    @classmethod
    def here(cls, problem: SparseProblem, kernels: KernelCache) -> Self:
        """For the current device."""
        import cupy  # pyright: ignore[reportMissingImports]

        processors = int(cupy.cuda.Device().attributes["MultiProcessorCount"])
        return cls(problem, kernels, device_arch(), processors, cupy.zeros(1, np.uint32))

    def __call__(
        self, q: Any, out: Any, maps: BlockMaps, first_block: int, tables: Any, work: tuple[Any, Any, Any],
        scale: float,
    ) -> None:  # fmt: skip
        """Write the rows of `out` that the work names, on CuPy's current stream.

        Args:
            q: `[rows, heads, head_dim]`, contiguous, 16-bit.
            out: as `q`.
            maps: of the blocks.
            first_block: of this layer in the maps.
            tables: int32 on the device: blocks of each sequence, where the work's items say.
            work: items, entries and low of a `Work`, on the device.
            scale: of the scores.
        """
        items, entries, low = work
        count = items.size // ITEM_WORDS
        blocks = min(self._processors, count * self.problem.heads)
        args = (
            q, out, maps.keys, maps.values, tables, items, entries, low, self._counter,
            np.int32(count), np.int32(first_block), np.float32(scale * LOG2_E),
        )  # fmt: skip
        self._kernel((blocks,), (THREADS,), args, shared_mem=self.problem.shared_bytes)
