"""The CPU's KV cache: one allocation, blocks as they go on the wire."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cpu.program import address
from kvrelay_kernels.cpu.weights import aligned
from kvrelay_kernels.quant import BlockLayout


class CpuArena:
    """`[layers, blocks, block_bytes]` in one piece; its pages are first touched when blocks are written."""

    def __init__(self, layout: BlockLayout, layers: int, blocks: int) -> None:
        self.layout, self.layers, self.blocks = layout, layers, blocks
        self._bytes: NDArray[np.uint8] = aligned((layers, blocks, layout.block_bytes), np.uint8, zero=True)
        quantized = layout.format.quantized
        self.cache: NDArray[Any] = self._bytes.reshape(-1).view(np.uint8 if quantized else np.float32)
        """The whole arena, flat: bytes, or float32 where not quantized; what follows counts its items."""
        self.block_items = layout.block_bytes // self.cache.itemsize
        self.layer_items = blocks * self.block_items
        names = [*layout.format.parts]
        names += names[-1:] * (3 - len(names))
        offsets = [
            layout.frame(f"{side}_{name}").offset // self.cache.itemsize for side in "kv" for name in names
        ]
        self.places: NDArray[np.int64] = np.array(offsets, np.int64)
        """Where K's codes, scales and biases, then V's, begin in a block; a side's last array stands in for
        those that its format does not have."""

    def place(self, layer: int) -> tuple[int, int, int, int]:
        """Address of the cache, where in it the layer begins, a block's items, address of `places`."""
        return address(self.cache), layer * self.layer_items, self.block_items, address(self.places)

    def read_block(self, layer: int, block: int) -> memoryview:
        """A view of the block's bytes."""
        return memoryview(self._bytes[layer, block]).toreadonly()

    def write_block(self, layer: int, block: int, payload: memoryview) -> None:
        """Copy a block's bytes in. Raises ValueError where their number is not the layout's."""
        if payload.nbytes != self.layout.block_bytes:
            raise ValueError(f"a block has {self.layout.block_bytes} bytes, not {payload.nbytes}")
        self._bytes[layer, block] = np.frombuffer(payload, np.uint8)
