"""Attention of the sequences that bring one row each, whatever the shapes of a model's layers."""

from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from kvrelay_kernels.cuda.arena import CudaArena
from kvrelay_kernels.cuda.batch import DeviceBatch
from kvrelay_kernels.cuda.clusters import Rooms
from kvrelay_kernels.cuda.cudnn_attention import CudnnAttention
from kvrelay_kernels.cuda.cudnn_decode import CudnnDecode
from kvrelay_kernels.cuda.decode_attention import DecodeAttention, DecodeProblem, Element16
from kvrelay_kernels.cuda.decode_route import Choice, DecodeRoute, choose_route
from kvrelay_kernels.cuda.decode_single_pass import SinglePass, device_rooms
from kvrelay_kernels.cuda.module import KernelCache
from kvrelay_kernels.cuda.rows import RowKernels
from kvrelay_kernels.interface import AttentionSpec
from kvrelay_kernels.plans import DeviceClass, PlanCounts, PlanStore
from kvrelay_kernels.quant import BLOCK_TOKENS

SMALLEST_CAPACITY = 8


class Kernel(Protocol):
    """Decode attention on one arena: `DecodeAttention`, and what takes its place on other routes."""

    def attach(self, arena: Any) -> None:
        """Take the cache to read."""
        ...

    def plan(self, lengths: Any) -> None:
        """Prepare a step's calls."""
        ...

    def __call__(self, q: Any, layer: int, tables: Any, out: Any) -> None:
        """Attend in a layer, as planned."""
        ...


class DecodeRows:
    """One kernel for each arena, kind of layer, capacity and route, planned once a step.

    Arenas have their own, since recorded steps keep reading what an instance was attached to.
    """

    def __init__(
        self,
        element: Element16,
        kernels: KernelCache,
        rows: RowKernels,
        plans: PlanStore,
        device: DeviceClass,
        route: DecodeRoute | None = None,
    ) -> None:
        """`plans` keeps those of cuDNN, should a step go through it; `route` forces a kernel."""
        self._element: Element16 = element
        self._kernels = kernels
        self._rows = rows
        self._plans, self._device = plans, device
        self._cudnn: CudnnAttention | None = None
        self._rooms: Rooms | None = None
        self._route: DecodeRoute | None = route
        self._kept: WeakKeyDictionary[CudaArena, dict[tuple[AttentionSpec, int, Choice], _Attached]] = (
            WeakKeyDictionary()
        )

    @property
    def plan_counts(self) -> PlanCounts:
        """How cuDNN's plans were come by since the start."""
        return PlanCounts() if self._cudnn is None else self._cudnn.plan_counts

    def __call__(
        self, q: Any, batch: DeviceBatch, arena: CudaArena, layer: int, spec: AttentionSpec, out: Any
    ) -> None:
        """Write the rows of `batch.singles` to `out`; q and out are uint16 `[rows, heads, head_dim]`."""
        import cupy  # pyright: ignore[reportMissingImports]

        singles = batch.singles
        if singles is None:
            return
        attached = self._attached(arena, spec, singles.count, singles.block_tables.shape[1])
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

    def _attached(self, arena: CudaArena, spec: AttentionSpec, count: int, blocks: int) -> "_Attached":
        problem = DecodeProblem(arena.layout, spec, self._element)
        if self._rooms is None:
            self._rooms = device_rooms(self._kernels)
        choice = choose_route(problem, count, blocks * BLOCK_TOKENS, self._rooms, forced=self._route)
        capacity = max(SMALLEST_CAPACITY, 1 << (count - 1).bit_length())
        kept = self._kept.setdefault(arena, {})
        key = (spec, capacity, choice)
        if key not in kept:
            kept[key] = _Attached(self._new_kernel(problem, capacity, choice))
            kept[key].attention.attach(arena.bytes)
        return kept[key]

    def _new_kernel(self, problem: DecodeProblem, capacity: int, choice: Choice) -> Kernel:
        match choice.route:
            case "single-pass":
                return SinglePass(problem, self._kernels, choice.cluster)
            case "cudnn":
                self._cudnn = self._cudnn or CudnnAttention(self._plans, self._device)
                return CudnnDecode(problem, capacity, self._cudnn)
            case "split-k":
                return DecodeAttention(problem, capacity, self._kernels)


@dataclass
class _Attached:
    """An instance on one arena, and the step it is planned for."""

    attention: Kernel
    planned: DeviceBatch | None = None
