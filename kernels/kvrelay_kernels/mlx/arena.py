"""The block arena in MLX arrays: one array a frame and layer, `[blocks, kv_heads, 64, width]`."""

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.mlx.codec import dequantize, quantize
from kvrelay_kernels.mlx.rotation import rotate
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout, Frame

TYPES = {
    "uint8": mx.uint8,
    "uint32": mx.uint32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
    "float32": mx.float32,
}
HOST_TYPES = {"bfloat16": "uint16"}
"""NumPy has no bfloat16: its bytes travel as those of another type."""


class MlxArena:
    """See `Arena` in the kernel interface."""

    def __init__(self, layout: BlockLayout, layers: int, blocks: int) -> None:
        unknown = [frame.dtype for frame in layout.frames if frame.dtype not in TYPES]
        if unknown:
            raise FormatUnsupported(f"MLX holds no {unknown[0]}")
        self.layout = layout
        self.layers = layers
        self.blocks = blocks
        self._frames = [
            {frame.name: mx.zeros((blocks, *frame.shape), TYPES[frame.dtype]) for frame in layout.frames}
            for _ in range(layers)
        ]
        mx.eval(self._frames)

    def read_block(self, layer: int, block: int) -> memoryview:
        """The bytes of a block, copied."""
        payload = np.zeros(self.layout.block_bytes, np.uint8)
        for frame in self.layout.frames:
            values = self._frames[layer][frame.name][block]
            host = np.array(values.view(mx.uint16) if frame.dtype in HOST_TYPES else values)
            payload[frame.offset : frame.offset + frame.nbytes] = (
                np.ascontiguousarray(host).view(np.uint8).reshape(-1)
            )
        return payload.data

    def write_block(self, layer: int, block: int, payload: memoryview) -> None:
        """Put a block's bytes into place."""
        if payload.nbytes != self.layout.block_bytes:
            raise ValueError(f"a block has {self.layout.block_bytes} bytes, not {payload.nbytes}")
        octets = np.frombuffer(payload, np.uint8)
        for frame in self.layout.frames:
            self._frames[layer][frame.name][block] = _from_bytes(octets, frame)
        mx.eval(self._frames[layer])

    def append(self, layer: int, blocks: mx.array, offsets: mx.array, k: mx.array, v: mx.array) -> None:
        """Store `[rows, kv_heads, head_dim]` keys and values, row r as token `offsets[r]` of `blocks[r]`."""
        frames, fmt = self._frames[layer], self.layout.format
        if fmt.rotates_values:
            v = rotate(v.astype(mx.float32))
        for side, values in (("k", k), ("v", v)):
            stored = quantize(values, fmt) if fmt.quantized else {"values": values.astype(TYPES[fmt.element])}
            for name, part in stored.items():
                frames[f"{side}_{name}"][blocks, :, offsets] = part

    def gather(self, layer: int, side: str, tables: mx.array) -> mx.array:
        """Values of blocks `[sequences, blocks]`: `[sequences, kv_heads, blocks * 64, head_dim]`.

        V is as it is stored: rotated, if the format rotates values.
        """
        frames, fmt = self._frames[layer], self.layout.format
        arrays = {name: _joined(frames[f"{side}_{name}"][tables]) for name in fmt.parts}
        return dequantize(arrays, fmt) if fmt.quantized else arrays["values"]


def _joined(gathered: mx.array) -> mx.array:
    """`[sequences, blocks, kv_heads, 64, width]` with the tokens of all blocks behind each other."""
    sequences, blocks, heads, _, width = gathered.shape
    return gathered.swapaxes(1, 2).reshape(sequences, heads, blocks * BLOCK_TOKENS, width)


def _from_bytes(octets: NDArray[np.uint8], frame: Frame) -> mx.array:
    host = octets[frame.offset : frame.offset + frame.nbytes].view(
        np.dtype(HOST_TYPES.get(frame.dtype, frame.dtype))
    )
    values = mx.array(host.reshape(frame.shape))
    return values.view(mx.bfloat16) if frame.dtype in HOST_TYPES else values
