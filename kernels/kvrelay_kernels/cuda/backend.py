"""The operations of a decoder on an NVIDIA GPU."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.arena import CudaArena
from kvrelay_kernels.cuda.batch import DeviceBatch, Uploads, upload_batch
from kvrelay_kernels.cuda.decode_attention import HEAD_DIMS, Element16
from kvrelay_kernels.cuda.decode_route import DecodeRoute
from kvrelay_kernels.cuda.decode_rows import DecodeRows
from kvrelay_kernels.cuda.device import find_gpu
from kvrelay_kernels.cuda.draw import MOST_TOKENS
from kvrelay_kernels.cuda.drawn_steps import CudaDrawing
from kvrelay_kernels.cuda.few_rows import MOST_ROWS
from kvrelay_kernels.cuda.gemm import CudaLinear, Products, row_bucket
from kvrelay_kernels.cuda.module import KernelCache, device_arch
from kvrelay_kernels.cuda.prefill_attention import PrefillAttention
from kvrelay_kernels.cuda.recording import Recording
from kvrelay_kernels.cuda.rope import RopeAppend
from kvrelay_kernels.cuda.rows import RowKernels
from kvrelay_kernels.cuda.step_rows import StepRows
from kvrelay_kernels.cuda.weights import WeightLoader
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import (
    Activation,
    AttentionSpec,
    BlockCounts,
    HostWeight,
    Logits,
    RecordedStep,
    RopeTable,
    Step,
    StepBatch,
    WeightMode,
)
from kvrelay_kernels.plans import PlanCounts, PlanStore, default_plan_folder, open_plans
from kvrelay_kernels.quant import BlockLayout
from kvrelay_kernels.quant.formats import Element


class CudaBackend:
    """Everything of a step runs on one stream, in order; the host waits in `logits` alone.

    Activations are `element`s, held as their bits in CuPy's uint16; the residual stream, which `embed` begins
    and `add_rms_norm` adds to, is float32, and so are all sums, norms and angles. One thread computes at a
    time.
    """

    name = "cuda"
    chunk_tokens = 8192

    def __init__(
        self,
        threads: int = 1,
        element: Element16 = "float16",
        plans: PlanStore | None = None,
        decode_route: DecodeRoute | None = None,
        overlap: bool = True,
    ) -> None:
        """`plans` keeps compiled kernels and tuned choices; None: those of this user's machine.
        `decode_route` forces the kernel that attends for decoding sequences; None: the table's.
        `overlap`: kernels may begin before the ones ahead have ended, where the device can (see `launch`).

        The host's part needs one thread, whatever `threads` allows. float16 has three bits more than bfloat16
        and holds what SmolLM2 and the smallest Gemma 3 compute beside the residual stream, 25000 at most;
        models that exceed 65504 there need bfloat16.

        Raises:
            BackendUnavailable: no usable GPU, or a library is missing; the message says what to install.
            FormatUnsupported: the element has not 16 bits.
        """
        if element not in get_args(Element16):
            raise FormatUnsupported(f"the CUDA backend computes in {get_args(Element16)}, not in {element}")
        gpu = find_gpu()
        import cupy  # pyright: ignore[reportMissingImports]

        self.gpu = gpu
        self.element: Element = element
        self.counts = BlockCounts()
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.stream.use()
        store = open_plans(default_plan_folder()) if plans is None else plans
        self._kernels = kernels = KernelCache(store, overlap)
        self.uploads = Uploads()
        self._weights = WeightLoader(element, kernels)
        self._products = Products(element, kernels, store, gpu.device_class)
        self._rows = RowKernels(element, kernels)
        self._append = RopeAppend(element, kernels)
        self._decode = DecodeRows(element, kernels, self._rows, store, gpu.device_class, decode_route)
        self._prefill = PrefillAttention(element, kernels, self.uploads, store, gpu.device_class, self.counts)
        self.recorded = cupy.cuda.MemoryPool()
        """What all recorded steps work in; they run one at a time."""
        self._batch: DeviceBatch | None = None
        self._host_logits: NDArray[np.float32] = np.empty(0, np.float32)

    @property
    def plan_counts(self) -> PlanCounts:
        """How kernels and tuned choices were come by since the start."""
        attention = self._decode.plan_counts + self._prefill.plan_counts
        return self._kernels.counts + self._products.counts + attention

    def load_linear(
        self, parts: Sequence[HostWeight], mode: WeightMode, bias: NDArray[Any] | None = None
    ) -> CudaLinear:
        """See `Backend.load_linear`; codes stay codes. Raises FormatUnsupported, MemoryError."""
        return self._load(parts, mode, bias, gated=False)

    def load_gated(self, gate: HostWeight, up: HostWeight, mode: WeightMode) -> CudaLinear:
        """See `Backend.load_gated`; 8 divides `width`. Raises FormatUnsupported, MemoryError."""
        return self._load([gate, up], mode, None, gated=True)

    def load_array(self, values: NDArray[Any]) -> Any:
        """The values as float32: what norms and rope multiply with."""
        import cupy  # pyright: ignore[reportMissingImports]

        self.stream.use()
        return cupy.asarray(np.ascontiguousarray(values, np.float32))

    def new_arena(self, layout: BlockLayout, layers: int, blocks: int) -> CudaArena:
        """See `Backend.new_arena`."""
        if layout.head_dim not in HEAD_DIMS:
            raise FormatUnsupported(
                f"attention on CUDA has head dimensions {HEAD_DIMS}, not {layout.head_dim}"
            )
        if not layout.format.quantized and layout.format.element != self.element:
            raise FormatUnsupported(
                f"this backend keeps unquantized caches in {self.element}, not {layout.format.element}"
            )
        self.stream.use()
        return CudaArena(layout, layers, blocks)

    def embed(self, table: CudaLinear, token_ids: NDArray[np.int32], scale: float) -> Any:
        """Rows `token_ids` times `scale`, float32. Raises IndexError for an id outside the table."""
        table.check_rows(token_ids)
        self.stream.use()
        return self.embed_there(table, self.uploads.send([token_ids])[0], scale)

    def embed_there(self, table: CudaLinear, ids: Any, scale: float, newest: Any = None) -> Any:
        """`embed` of ids that the host told the device, or, for ~place, of those that `newest` has there."""
        out = self._blank(len(ids), table.k, np.float32)
        self._rows.embed(table.weight, ids, scale, out, newest)
        return out

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        """See `Backend.rms_norm`; 16 bit, whatever x is."""
        out = self._blank(*x.shape)
        self._rows.norm(x, weight, eps, out)
        return out

    def add_rms_norm(self, x: Any, y: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        """See `Backend.add_rms_norm`; the sum is float32 as x is, the norm of it 16 bit."""
        rows, width = x.shape
        total, out = self._blank(rows, width, np.float32), self._blank(rows, width)
        self._rows.norm(x, weight, eps, out, y, total)
        return total, out

    def linear(self, x: Any, weight: CudaLinear, batch: StepBatch | None = None) -> Any:
        """See `Backend.linear`: prompts and other rows are products of two kinds.

        Without a batch, a 16-bit weight takes all rows as those of prompts, codes more than `MOST_ROWS`.
        """
        out = self._blank(len(x), weight.n)
        for begin, end, prompts in _runs(len(x), weight, batch):
            self._products(x[begin:end], weight, out[begin:end], prompts)
        return out

    def gated_linear(
        self, x: Any, weight: CudaLinear, activation: Activation, batch: StepBatch | None = None
    ) -> Any:
        """See `Backend.gated_linear`: rows of prompts are rounded to 16 bit before their activation."""
        out = self._blank(len(x), weight.n // 2)
        for begin, end, prompts in _runs(len(x), weight, batch):
            if self._products.gates(weight, prompts):
                self._products(x[begin:end], weight, out[begin:end], prompts, activation)
            else:
                gate_up = self._blank(end - begin, weight.n)
                self._products(x[begin:end], weight, gate_up, prompts)
                self._rows.gate(gate_up, activation, out[begin:end])
        return out

    def rope_append(
        self,
        qkv: Any,
        batch: StepBatch,
        arena: CudaArena,
        layer: int,
        spec: AttentionSpec,
        rope: RopeTable,
        norms: tuple[Any, Any, float] | None,
    ) -> Any:
        """See `Backend.rope_append`; between qkv and what is stored, nothing is rounded to 16 bit."""
        there = self._there(batch, arena)
        q = self.append_there(qkv, there, arena, layer, spec, rope, norms)
        arena.appended(layer, self.stream)
        return q

    def append_there(
        self,
        qkv: Any,
        batch: DeviceBatch,
        arena: CudaArena,
        layer: int,
        spec: AttentionSpec,
        rope: RopeTable,
        norms: tuple[Any, Any, float] | None,
    ) -> Any:
        """`rope_append` of a batch that lies on the device."""
        q = self._blank(len(qkv), spec.heads * spec.head_dim)
        self._append(qkv, batch, arena, layer, spec, rope, norms, q)
        return q

    def attention(self, q: Any, batch: StepBatch, arena: CudaArena, layer: int, spec: AttentionSpec) -> Any:
        """See `Backend.attention`."""
        return self.attend_there(q, self._there(batch, arena), arena, layer, spec)

    def attend_there(
        self, q: Any, batch: DeviceBatch, arena: CudaArena, layer: int, spec: AttentionSpec
    ) -> Any:
        """`attention` of a batch that lies on the device."""
        out = self._blank(*q.shape)
        heads = (len(q), spec.heads, spec.head_dim)
        self._decode(q.reshape(heads), batch, arena, layer, spec, out.reshape(heads))
        if batch.host.prompt_numbers:
            self._prefill.prefill(q.reshape(heads), batch, arena, layer, spec, out.reshape(heads))
        if arena.layout.format.rotates_values:
            self._rows.rotate(out, spec.head_dim)
        return out

    def logits(self, x: Any, head: CudaLinear, rows: NDArray[np.int32]) -> Logits:
        """float32 logits of the given rows, in pinned memory; waits for the step."""
        if len(rows) != len(x) or not np.array_equal(rows, np.arange(len(x))):
            some = self._blank(len(rows), x.shape[1])
            self._rows.gather(x, self.uploads.send([rows])[0], some)
            x = some
        logits = self.logits_there(x, head, self._pinned_logits(len(rows), head.n))
        self.stream.synchronize()
        return logits.copy()

    def logits_there(self, x: Any, head: CudaLinear, host: Logits) -> Logits:
        """Logits of all rows of `x`, on their way to `host`, which is pinned; does not wait."""
        from cupy.cuda import runtime  # pyright: ignore[reportMissingImports]

        out = self._blank(len(x), head.n, np.float32)
        self.logits_into(x, head, out)
        # Of the runtime itself: CuPy's own copies refuse to be taken down in a graph.
        to_host = runtime.memcpyDeviceToHost
        runtime.memcpyAsync(host.ctypes.data, out.data.ptr, host.nbytes, to_host, self.stream.ptr)
        return host

    def logits_into(self, x: Any, head: CudaLinear, out: Any) -> None:
        """Logits of all rows of `x`, to float32 `[rows, vocabulary]` on the device."""
        self._products(x, head, out, prompts=False)

    def record(self, step: Step, rows: int, arena: CudaArena) -> RecordedStep:
        """The step as a CUDA graph: the host tells its rows, launches once, and reads the logits."""
        return Recording(self, step, arena)

    def new_step_rows(self, rows: int, width: int) -> StepRows:
        """The arrays of a recorded step of so many rows, with tables of so many blocks."""
        return StepRows(rows, width, device_arch(), self._kernels, self.uploads)

    def new_drawing(self, vocabulary: int, places: int) -> CudaDrawing | None:
        """See `Backend.new_drawing`; None for vocabularies of more than `MOST_TOKENS`."""
        self.stream.use()
        return CudaDrawing(self, self._kernels, vocabulary, places) if vocabulary <= MOST_TOKENS else None

    def warm(self, shapes: Mapping[str, Any]) -> None:
        """Have the algorithms of all products up to a chunk of rows chosen when they are first met."""
        import cupy  # pyright: ignore[reportMissingImports]

        # What loading worked in goes back: other workers may share the card, and all share the host.
        cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()
        self._products.expect(max(shapes["chunk"], shapes["sequences"]), shapes["sequences"])

    def _load(
        self, parts: Sequence[HostWeight], mode: WeightMode, bias: NDArray[Any] | None, gated: bool
    ) -> CudaLinear:
        self.stream.use()
        matrix = self._weights.matrix(parts, mode, bias, gated)
        # Products read a weight before they wait for the kernels ahead, which may be those that wrote it.
        self.stream.synchronize()
        return matrix

    def _there(self, batch: StepBatch, arena: CudaArena) -> DeviceBatch:
        """A step's batch on the device; the last one is kept, since each layer asks for it."""
        if self._batch is None or self._batch.host is not batch:
            self.stream.use()
            arena.settle(self.stream)
            self._batch = upload_batch(batch, self.uploads)
        return self._batch

    def _blank(self, rows: int, width: int, kind: Any = np.uint16) -> Any:
        """Room for `[rows, width]`. Sizes are those of buckets, so that the pool's memory comes to rest."""
        import cupy  # pyright: ignore[reportMissingImports]

        return cupy.empty((max(row_bucket(rows), rows), width), kind)[:rows]

    def _pinned_logits(self, rows: int, width: int) -> Logits:
        import cupyx  # pyright: ignore[reportMissingImports]

        if self._host_logits.size < rows * width:
            self._host_logits = cupyx.empty_pinned((row_bucket(rows) * width,), np.float32)
        return self._host_logits[: rows * width].reshape(rows, width)


def _runs(rows: int, weight: CudaLinear, batch: StepBatch | None) -> list[tuple[int, int, bool]]:
    """Rows that take products of one kind: `(begin, end, prompts)`."""
    if batch is None:
        return [(0, rows, not weight.coded or rows > MOST_ROWS)]
    return batch.runs
