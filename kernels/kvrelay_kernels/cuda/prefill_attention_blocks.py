"""The blocks that prompts attend to, in 16 bit: an unquantized arena in place, others expanded."""

from dataclasses import dataclass
from typing import Any, Protocol

from kvrelay_kernels.cuda.arena import CudaArena
from kvrelay_kernels.cuda.block_sparse import BlockMaps
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.expand import Expansion, Scratch
from kvrelay_kernels.cuda.module import KernelCache
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.quant import BlockLayout


@dataclass(frozen=True)
class LayerBlocks:
    """16-bit blocks of one layer on the device."""

    layout: BlockLayout
    address: int
    """Of the first block."""
    blocks: int
    maps: BlockMaps
    first: int
    """Where the first block is in the maps."""


class Blocks(Protocol):
    """An arena's blocks as prefill reads them."""

    expanded: bool
    """Whether tables name blocks in scratch, in the order of a step's sources."""

    def layer(self, layer: int, sources: Any) -> LayerBlocks:
        """The blocks of a layer, `sources` (`[n, 2]` on the device: block, tokens) of them at least."""
        ...


class BlocksInPlace:
    """An unquantized arena."""

    expanded = False

    def __init__(self, arena: CudaArena) -> None:
        self._layout, self._blocks = arena.layout, arena.blocks
        self._address = arena.layer_address(0)
        self._maps = BlockMaps(arena.layout, self._address, arena.layers * arena.blocks)

    def layer(self, layer: int, sources: Any) -> LayerBlocks:
        """The layer itself."""
        first = layer * self._blocks
        address = self._address + first * self._layout.block_bytes
        return LayerBlocks(self._layout, address, self._blocks, self._maps, first)


class BlocksInScratch:
    """Any arena, one layer's blocks at a time; what lies behind a sequence's end is zero there."""

    expanded = True

    def __init__(self, arena: CudaArena, scratch: Scratch) -> None:
        self._address, self._blocks = arena.layer_address(0), arena.blocks
        self._block_bytes = arena.layout.block_bytes
        self._scratch = scratch
        self._maps: BlockMaps | None = None

    def layer(self, layer: int, sources: Any) -> LayerBlocks:
        """Expand the sources; valid until the next call. Raises MemoryError."""
        scratch = self._scratch
        grown = scratch.reserve(len(sources))
        address, capacity = scratch.blocks.data.ptr, len(scratch.blocks)
        if grown or self._maps is None:
            self._maps = BlockMaps(scratch.layout, address, capacity)
        scratch.fill(self._address + layer * self._blocks * self._block_bytes, sources)
        return LayerBlocks(scratch.layout, address, capacity, self._maps, 0)


def open_blocks(arena: CudaArena, element: Element16, kernels: KernelCache, in_place: bool) -> Blocks:
    """How prefill in `element` reads an arena; `in_place` says whether it may read blocks where they are.

    Raises:
        FormatUnsupported: the cache's 16-bit type is another one.
    """
    fmt = arena.layout.format
    if not fmt.quantized and fmt.element != element:
        raise FormatUnsupported(f"a cache of {fmt.element} does not go with {element} queries")
    if in_place and not fmt.quantized:
        return BlocksInPlace(arena)
    return BlocksInScratch(arena, Scratch(Expansion(arena.layout, element), arena.blocks, kernels))
