"""The bytes of one KV block: the same in the prefill arena, on the wire, in Redis and in the decode arena."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash

from kvrelay_kernels.quant.formats import CacheFormat

BLOCK_TOKENS = 64
FRAME_ALIGNMENT = 64


@dataclass(frozen=True)
class Frame:
    """One array of a block: `shape` elements of `dtype`, C order, `offset` bytes behind the block's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the array, without the padding behind it."""
        return int(np.prod(self.shape)) * (2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize)


@dataclass(frozen=True)
class BlockLayout:
    """Where each frame of a block of `BLOCK_TOKENS` tokens of one layer lies.

    Frames in order: K codes `[kv_heads, 64, words]` uint32, K scales `[kv_heads, 64, groups]` float16 or
    uint8, in affine formats as many K biases, then the same for V. An unquantized block has the two frames
    `k_values` and `v_values`, `[kv_heads, 64, head_dim]`. Codes are a little-endian bit stream in
    32-bit words along the head dimension (MLX's packing): code i sits at bit i * bits.
    """

    format: CacheFormat
    kv_heads: int
    head_dim: int

    @cached_property
    def frames(self) -> tuple[Frame, ...]:
        """The frames in wire order, each aligned to `FRAME_ALIGNMENT` bytes."""
        rows = (self.kv_heads, BLOCK_TOKENS)
        widths = {
            "codes": self.head_dim * self.format.code_bits // 32,
            "values": self.head_dim,
        }
        frames: list[Frame] = []
        offset = 0
        for side in ("k", "v"):
            for name, dtype in self.format.parts.items():
                width = widths.get(name) or self.head_dim // self.format.group
                frame = Frame(f"{side}_{name}", dtype, (*rows, width), offset)
                frames.append(frame)
                offset += -(-frame.nbytes // FRAME_ALIGNMENT) * FRAME_ALIGNMENT
        return tuple(frames)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one block: all frames with their padding."""
        last = self.frames[-1]
        return last.offset + -(-last.nbytes // FRAME_ALIGNMENT) * FRAME_ALIGNMENT

    @property
    def bits_per_element(self) -> float:
        """Bits that an element of K or V takes in a block, with its share of scales and padding."""
        return 8 * self.block_bytes / (2 * self.kv_heads * BLOCK_TOKENS * self.head_dim)

    def frame(self, name: str) -> Frame:
        """The frame called `name`; KeyError where this format has none."""
        for frame in self.frames:
            if frame.name == name:
                return frame
        raise KeyError(name)

    @cached_property
    def fingerprint(self) -> int:
        """64-bit hash of everything that decides how the bytes are read."""
        fmt = self.format
        parts = ("kvrelay-layout-2", fmt.name, fmt.element, self.kv_heads, self.head_dim, BLOCK_TOKENS)
        return xxhash.xxh3_64_intdigest("|".join(map(str, parts)).encode())
