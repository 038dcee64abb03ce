"""Attention of a step's prompts over the paged cache, whatever its format."""

import logging
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from kvrelay_kernels.cuda.arena import CudaArena
from kvrelay_kernels.cuda.batch import DeviceBatch, Uploads
from kvrelay_kernels.cuda.block_sparse import BlockSparse, SparseProblem
from kvrelay_kernels.cuda.block_sparse_mma import BlockSparseMma
from kvrelay_kernels.cuda.cudnn_attention import CudnnAttention, CudnnProblem, CudnnStep, pad_step
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.module import KernelCache, device_arch
from kvrelay_kernels.cuda.prefill_attention_blocks import Blocks, LayerBlocks, open_blocks
from kvrelay_kernels.cuda.prefill_attention_route import Route, choose_route
from kvrelay_kernels.cuda.prefill_attention_step import Masks, StepLayout, lay_out_step, prompt_masks
from kvrelay_kernels.errors import BackendUnavailable, FormatUnsupported
from kvrelay_kernels.interface import AttentionSpec, BlockCounts
from kvrelay_kernels.plans import DeviceClass, PlanCounts, PlanStore

log = logging.getLogger(__name__)


@dataclass
class _Step:
    """A step under one kind of layer's mask: laid out and sent once, for all layers of the kind."""

    layout: StepLayout
    work: tuple[Any, Any, Any]
    sources: Any
    tables: Any
    padded: tuple[CudnnStep, list[Any]] | None = None
    """For cuDNN, once it is asked."""


class PrefillAttention:
    """Prompts' rows over the blocks of an arena, their own included; one for a backend.

    Keys and values are read from the arena alone, so that a row's output does not depend on how its prompt
    was cut: 16-bit blocks in place, others expanded into scratch that all layers share.
    """

    def __init__(
        self,
        element: Element16,
        kernels: KernelCache,
        uploads: Uploads,
        plans: PlanStore,
        device: DeviceClass,
        counts: BlockCounts | None = None,
        route: Route | None = None,
    ) -> None:
        """`counts` takes prompts' tiles, counted once for all heads, and their routes; `route` forces one.

        Where none is forced, what cuDNN cannot do goes to the own kernels.

        Raises:
            FormatUnsupported: the device cannot take the forced route.
            BackendUnavailable: cuDNN is forced, and is missing or too old.
        """
        self._element: Element16 = element
        self._kernels = kernels
        self._uploads = uploads
        self._counts = counts or BlockCounts()
        self._arch = device_arch()
        self._forced: Route | None = route
        self._cudnn: CudnnAttention | None = None
        self._fault: str | None = None
        if choose_route(self._arch, False, route) == "cudnn":
            try:
                self._cudnn = CudnnAttention(plans, device)
            except BackendUnavailable as error:
                self._fault = str(error)
                log.warning("prompts do without cuDNN: %s", error)
        log.info(
            "prompts on %s take the route %s", self._arch, choose_route(self._arch, False, route, self._fault)
        )
        self._refused: dict[AttentionSpec, str] = {}
        self._sparse: dict[SparseProblem, BlockSparse | BlockSparseMma] = {}
        self._blocks: WeakKeyDictionary[CudaArena, Blocks] = WeakKeyDictionary()
        self._now: tuple[DeviceBatch | None, Masks | None] = None, None
        self._steps: dict[tuple[int | None, bool], _Step] = {}

    @property
    def plan_counts(self) -> PlanCounts:
        """How cuDNN's plans were come by since the start."""
        return PlanCounts() if self._cudnn is None else self._cudnn.plan_counts

    def prefill(
        self,
        q: Any,
        batch: DeviceBatch,
        arena: CudaArena,
        layer: int,
        spec: AttentionSpec,
        out: Any,
        masks: Masks | None = None,
    ) -> None:
        """Write the prompts' rows of `out`, on CuPy's current stream.

        Args:
            q: `[rows, heads, head_dim]`, contiguous, 16-bit.
            batch: the step; it has at least one prompt.
            arena: the cache, which holds the step's own keys and values too.
            layer: whose keys and values to read.
            spec: heads, scale and window.
            out: as `q`.
            masks: of prompts that see other keys than the window says.

        Raises:
            FormatUnsupported: a head dimension, format or mask that no route can do here.
            MemoryError: blocks find no room to be expanded.
            ValueError: a mask does not fit its prompt.
        """
        route = self._route(spec, masks)
        blocks = self._opened(arena)
        step = self._step(batch, spec.window, blocks.expanded, masks)
        there = blocks.layer(layer, step.sources)
        if route == "cudnn" and not self._through_cudnn(q, out, batch, spec, step, there):
            route = self._route(spec, masks)
        if route != "cudnn":
            self._sparse_kernel(spec, route)(
                q, out, there.maps, there.first, step.tables, step.work, spec.scale
            )
        self._counts.routes[route] += 1
        self._counts.computed += step.layout.work.computed
        self._counts.skipped += step.layout.work.skipped

    def _opened(self, arena: CudaArena) -> Blocks:
        if arena not in self._blocks:
            # cuDNN multiplies what lies behind a sequence's end by zero, which NaN survives.
            in_place = self._cudnn is None
            self._blocks[arena] = open_blocks(arena, self._element, self._kernels, in_place)
        return self._blocks[arena]

    def _step(self, batch: DeviceBatch, window: int | None, expanded: bool, masks: Masks | None) -> _Step:
        if self._now[0] is not batch or self._now[1] is not masks:
            self._now, self._steps = (batch, masks), {}
        if (window, expanded) not in self._steps:
            layout = lay_out_step(batch.host, prompt_masks(batch.host, window, masks))
            work = layout.work
            arrays = [work.items, work.entries, work.low]
            if expanded:
                arrays += [layout.sources, layout.tables]
            items, entries, low, *apart = self._uploads.send(arrays)
            sources, tables = apart if expanded else (None, batch.block_tables)
            self._steps[window, expanded] = _Step(layout, (items, entries, low), sources, tables)
        return self._steps[window, expanded]

    def _route(self, spec: AttentionSpec, masks: Masks | None) -> Route:
        fault = self._refused.get(spec, self._fault)
        return choose_route(self._arch, masks is not None, self._forced, fault)

    def _sparse_kernel(self, spec: AttentionSpec, route: Route) -> BlockSparse | BlockSparseMma:
        problem = SparseProblem(spec.heads, spec.kv_heads, spec.head_dim, self._element)
        if problem not in self._sparse:
            kind = BlockSparse if route == "sparse" else BlockSparseMma
            self._sparse[problem] = kind.here(problem, self._kernels)
        return self._sparse[problem]

    def _through_cudnn(
        self,
        q: Any,
        out: Any,
        batch: DeviceBatch,
        spec: AttentionSpec,
        step: _Step,
        there: LayerBlocks,
    ) -> bool:
        """Whether cuDNN did it; it is not asked again for what it refused."""
        assert self._cudnn is not None
        if step.padded is None:
            padded = pad_step(batch.host, step.layout.tables, spec.heads * spec.head_dim)
            step.padded = padded, self._uploads.send(padded.arrays)
        padded, arrays = step.padded
        problem = CudnnProblem(
            spec, there.layout, there.blocks, len(padded.rows), padded.most_rows, padded.most_keys
        )
        keys, values = (there.address + there.layout.frame(name).offset for name in ("k_values", "v_values"))
        try:
            self._cudnn(problem, q, out, keys, values, arrays)
        except FormatUnsupported as error:
            if self._forced is not None:
                raise
            log.warning("prompts of %s do without cuDNN: %s", spec, error)
            self._refused[spec] = str(error)
            return False
        return True
