"""The KV cache on the device, and its blocks' way out of it and into it."""

from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.quant import BlockLayout

STAGED = 32
"""Blocks that may be on their way into the arena at once."""


class CudaArena:
    """`[layers, blocks, block_bytes]` uint8 on the device.

    Copies run on streams of their own, beside the computing one: a block that leaves waits for its layer's
    last append alone, not for the layers behind it, and a step waits for the blocks that came in before.
    `read_block` and `write_block` may be called from any thread.
    """

    def __init__(self, layout: BlockLayout, layers: int, blocks: int) -> None:
        """Raises MemoryError where it does not fit on the device."""
        import cupy  # pyright: ignore[reportMissingImports]
        import cupyx  # pyright: ignore[reportMissingImports]

        self.layout, self.layers, self.blocks = layout, layers, blocks
        size = layers * blocks * layout.block_bytes
        try:
            self.bytes: Any = cupy.zeros((layers, blocks, layout.block_bytes), np.uint8)
        except MemoryError as error:
            free = cupy.cuda.runtime.memGetInfo()[0]
            raise MemoryError(
                f"a cache of {blocks} blocks in {layers} layers takes {size / 2**30:.1f} GiB; the GPU has"
                f" {free / 2**30:.1f} GiB free"
            ) from error
        cupy.cuda.get_current_stream().synchronize()
        self._leaving, self._coming = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        self._appended = [cupy.cuda.Event(disable_timing=True) for _ in range(layers)]
        self._reading, self._writing = Lock(), Lock()
        self._staging: NDArray[np.uint8] = cupyx.empty_pinned((STAGED, layout.block_bytes), np.uint8)
        self._staged = [cupy.cuda.Event(disable_timing=True) for _ in range(STAGED)]
        self._turn = 0
        self._landed: Any = None

    def layer_address(self, layer: int) -> int:
        """Where a layer's `[blocks, block_bytes]` begin on the device."""
        return int(self.bytes.data.ptr) + layer * self.blocks * self.layout.block_bytes

    def appended(self, layer: int, stream: Any) -> None:
        """Note that `stream` has been told all appends to a layer; blocks that leave wait for them."""
        self._appended[layer].record(stream)

    def settle(self, stream: Any) -> None:
        """Make what comes next on `stream` wait for the blocks that were written before."""
        if self._landed is not None:
            stream.wait_event(self._landed)

    def read_block(self, layer: int, block: int) -> memoryview:
        """The bytes of a block, complete, in pinned memory that is the caller's."""
        import cupyx  # pyright: ignore[reportMissingImports]

        payload = cupyx.empty_pinned((self.layout.block_bytes,), np.uint8)
        source = self.bytes[layer, block].data
        with self._reading:
            self._leaving.wait_event(self._appended[layer])
            self.settle(self._leaving)
            source.copy_to_host_async(payload.ctypes.data, payload.nbytes, self._leaving)
            self._leaving.synchronize()
        return memoryview(payload).toreadonly()

    def write_block(self, layer: int, block: int, payload: memoryview) -> None:
        """Copy a block's bytes in. Raises ValueError where their number is not the layout's."""
        if payload.nbytes != self.layout.block_bytes:
            raise ValueError(f"a block has {self.layout.block_bytes} bytes, not {payload.nbytes}")
        target = self.bytes[layer, block].data
        with self._writing:
            turn = self._turn = (self._turn + 1) % STAGED
            self._staged[turn].synchronize()
            self._staging[turn] = np.frombuffer(payload, np.uint8)
            self._coming.wait_event(self._appended[layer])  # a step that was given up may still run
            target.copy_from_host_async(self._staging[turn].ctypes.data, payload.nbytes, self._coming)
            self._staged[turn].record(self._coming)
            self._landed = self._staged[turn]
