"""Attention of the sequences that bring one row each, whatever the shapes of a model's layers."""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from kvrelay_kernels.cuda.arena import CudaArena
from kvrelay_kernels.cuda.batch import DeviceBatch
from kvrelay_kernels.cuda.decode_attention import DecodeAttention, DecodeProblem, Element16
from kvrelay_kernels.cuda.module import KernelCache
from kvrelay_kernels.cuda.rows import RowKernels
from kvrelay_kernels.interface import AttentionSpec

SMALLEST_CAPACITY = 8


class DecodeRows:
    """One `DecodeAttention` for each arena, kind of layer and capacity, planned once a step.

    Arenas have their own, since recorded steps keep reading what an instance was attached to.
    """

    def __init__(self, element: Element16, kernels: KernelCache, rows: RowKernels) -> None:
        self._element: Element16 = element
        self._kernels = kernels
        self._rows = rows
        self._kept: WeakKeyDictionary[CudaArena, dict[tuple[AttentionSpec, int], _Attached]] = (
            WeakKeyDictionary()
        )

    def __call__(
        self, q: Any, batch: DeviceBatch, arena: CudaArena, layer: int, spec: AttentionSpec, out: Any
    ) -> None:
        """Write the rows of `batch.singles` to `out`; q and out are uint16 `[rows, heads, head_dim]`."""
        import cupy  # pyright: ignore[reportMissingImports]

        singles = batch.singles
        if singles is None:
            return
        attached = self._attached(arena, spec, singles.count)
        attention = attached.attention
        if attached.planned is not batch:
            attention.plan(singles.lengths)
            attached.planned = batch
        if singles.rows is None:
            attention(q, layer, singles.block_tables, out)
            return
        shape = (singles.count, spec.heads, spec.head_dim)
        some, results = cupy.empty(shape, np.uint16), cupy.empty(shape, np.uint16)
        self._rows.gather(q, singles.rows, some)
        attention(some, layer, singles.block_tables, results)
        self._rows.scatter(results, singles.rows, out)

    def _attached(self, arena: CudaArena, spec: AttentionSpec, count: int) -> "_Attached":
        capacity = max(SMALLEST_CAPACITY, 1 << (count - 1).bit_length())
        kept = self._kept.setdefault(arena, {})
        if (spec, capacity) not in kept:
            problem = DecodeProblem(arena.layout, spec, self._element)
            attention = DecodeAttention(problem, capacity, self._kernels)
            attention.attach(arena.bytes)
            kept[spec, capacity] = _Attached(attention)
        return kept[spec, capacity]


@dataclass
class _Attached:
    """An instance on one arena, and the step it is planned for."""

    attention: DecodeAttention
    planned: DeviceBatch | None = None
