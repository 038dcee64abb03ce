"""Launcher of the pass that norms and ropes q and k and writes k and v into the arena's blocks."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kvrelay_kernels.cuda.arena import CudaArena
from kvrelay_kernels.cuda.batch import DeviceBatch
from kvrelay_kernels.cuda.format_constants import format_constants
from kvrelay_kernels.cuda.module import KernelCache, KernelKey, device_arch
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import AttentionSpec, RopeTable
from kvrelay_kernels.quant import BlockLayout
from kvrelay_kernels.quant.formats import Element

THREADS = 128
"""Of a thread block; mirrors `rope_append.cu`."""
FEW_ROWS, MANY_PASSES = 256, 3
"""Above so many rows a thread takes so many heads, one behind the other; below, one, to fill the card."""


@dataclass(frozen=True)
class AppendShape:
    """What the pass is compiled for."""

    layout: BlockLayout
    heads: int
    rotated: int
    """Elements of a head that are turned."""
    norms: bool
    element: Element
    passes: int = MANY_PASSES

    def __post_init__(self) -> None:
        dim, fmt = self.layout.head_dim, self.layout.format
        if dim % 8 or dim > 256 or self.rotated % 16:
            raise FormatUnsupported(f"head dimension {dim} with {self.rotated} turned: multiples of 8, of 16")
        if not fmt.quantized and fmt.element != self.element:
            raise FormatUnsupported(
                f"a cache of {fmt.element} does not go with activations of {self.element}"
            )

    @property
    def grid_columns(self) -> int:
        """Thread blocks of a row."""
        lanes = max(8, 1 << (self.layout.head_dim // 8 - 1).bit_length())
        return -(-(self.heads + 2 * self.layout.kv_heads) // (self.passes * (THREADS // lanes)))

    def key(self, arch: str) -> KernelKey:
        """The kernel."""
        constants = format_constants(self.layout) | {
            "HEADS": self.heads,
            "HALF": self.rotated // 2,
            "NORMS": int(self.norms),
            "PASSES": self.passes,
            "BFLOAT": int(self.element == "bfloat16"),
        }
        return KernelKey.of("rope_append", constants, arch)


class RopeAppend:
    """The kernels for one element type, on CuPy's current stream."""

    def __init__(self, element: Element, kernels: KernelCache) -> None:
        arch = device_arch()

        @cache
        def load(layout: BlockLayout, heads: int, rotated: int, norms: bool, passes: int) -> tuple[Any, int]:
            shape = AppendShape(layout, heads, rotated, norms, element, passes)
            return kernels.load(shape.key(arch), 0), shape.grid_columns

        self._load = load

    def __call__(
        self,
        qkv: Any,
        batch: DeviceBatch,
        arena: CudaArena,
        layer: int,
        spec: AttentionSpec,
        rope: RopeTable,
        norms: tuple[Any, Any, float] | None,
        q: Any,
    ) -> None:
        """Write q `[rows, heads * head_dim]`, and k and v into their blocks; see `Backend.rope_append`."""
        passes = 1 if len(q) <= FEW_ROWS else MANY_PASSES
        kernel, columns = self._load(
            arena.layout, spec.heads, 2 * rope.cos.shape[1], norms is not None, passes
        )
        q_norm, k_norm, eps = norms or (0, 0, 0.0)
        kernel(
            (columns, len(q)), (THREADS,),
            (
                qkv, batch.positions, batch.slots, rope.cos, rope.sin, q_norm, k_norm, np.float32(eps),
                arena.layer_address(layer), q,
            ),
        )  # fmt: skip
