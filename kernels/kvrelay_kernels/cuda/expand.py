"""Blocks of any format as 16-bit ones behind each other: a layer at a time, in scratch."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvrelay_kernels.cuda.format_constants import format_constants
from kvrelay_kernels.cuda.module import KernelCache, KernelKey, device_arch
from kvrelay_kernels.quant import BlockLayout
from kvrelay_kernels.quant.formats import CacheFormat, Element

THREADS = 256
SMALLEST = 64
"""Blocks that scratch begins with."""


@dataclass(frozen=True)
class Expansion:
    """From one layout to the unquantized one of the same heads."""

    layout: BlockLayout
    """What is read."""
    element: Element
    """What is written, 16 bit; that of the layout where it is not quantized."""

    @property
    def expanded(self) -> BlockLayout:
        """The layout that is written."""
        return BlockLayout(
            CacheFormat("none", 0, 0, self.element), self.layout.kv_heads, self.layout.head_dim
        )

    def key(self, arch: str) -> KernelKey:
        """The kernel."""
        to = self.expanded
        constants = format_constants(self.layout) | {
            "TO_BYTES": to.block_bytes,
            "TO_K": to.frame("k_values").offset,
            "TO_V": to.frame("v_values").offset,
            "BFLOAT": int(self.element == "bfloat16"),
        }
        return KernelKey.of("expand_blocks", constants, arch)


class Scratch:
    """Expanded blocks of one layer at a time; grows by doubling up to the arena's number of blocks."""

    def __init__(self, expansion: Expansion, limit: int, kernels: KernelCache) -> None:
        """`limit` is the most blocks that there ever are: those of the arena, each expanded once."""
        self.layout = expansion.expanded
        self._limit = limit
        self._kernel = kernels.load(expansion.key(device_arch()), 0)
        self.blocks: Any = None
        """`[capacity, block_bytes]` uint8 on the device; None before the first `reserve`."""

    def reserve(self, count: int) -> bool:
        """Have room for `count` blocks; whether that took new memory. Raises MemoryError."""
        import cupy  # pyright: ignore[reportMissingImports]

        if self.blocks is not None and count <= len(self.blocks):
            return False
        capacity = min(max(SMALLEST, 1 << (count - 1).bit_length()), self._limit)
        self.blocks = None  # what was there goes back to the pool first
        self.blocks = cupy.empty((capacity, self.layout.block_bytes), np.uint8)
        return True

    def fill(self, layer_address: int, sources: Any) -> None:
        """Expand blocks of the layer at `layer_address`, on CuPy's current stream.

        Args:
            layer_address: of its first block, on the device.
            sources: `[n, 2]` int32 on the device: block, and its tokens; the rest of it becomes zeros.
        """
        self._kernel((len(sources), 2), (THREADS,), (np.uint64(layer_address), sources, self.blocks))
