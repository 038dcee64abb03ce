"""The operations of a decoder on an ordinary processor."""

from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cpu.arena import CpuArena
from kvrelay_kernels.cpu.coded import FEW, coded_rows_code
from kvrelay_kernels.cpu.decode import Partials, attend_code, divide_code, merge_code
from kvrelay_kernels.cpu.integers import COLUMNS
from kvrelay_kernels.cpu.prefill import LANES, attend, expand_kernel
from kvrelay_kernels.cpu.products import few_rows_code, many_rows, panels_of_task
from kvrelay_kernels.cpu.program import address, operation, real
from kvrelay_kernels.cpu.recording import AtOnce, Recorder, Recording, Sink
from kvrelay_kernels.cpu.rope import append_code
from kvrelay_kernels.cpu.rows import add_norm_code, embed_code, gate_code, norm_code, trim_code
from kvrelay_kernels.cpu.small_floats import scaled_rows_code
from kvrelay_kernels.cpu.threads import Threads
from kvrelay_kernels.cpu.tiles import PANEL
from kvrelay_kernels.cpu.weights import PackedLinear, pack_linear
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import (
    Activation,
    AttentionSpec,
    BlockCounts,
    HostWeight,
    RecordedStep,
    RopeTable,
    Step,
    StepBatch,
    WeightMode,
)
from kvrelay_kernels.plans import PlanCounts
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout
from kvrelay_kernels.quant.formats import Element

Floats = NDArray[np.float32]

CHUNK = 2048
"""Elements of a task on whole rows, about a microsecond."""
NO_WINDOW = 2**31 - 1


class CpuBackend:
    """Runs on `threads` cores; one step at a time. Activations are float32 `[rows, width]`, C order."""

    name = "cpu"
    element: Element = "float32"
    chunk_tokens = 512

    def __init__(self, threads: int) -> None:
        self._threads = Threads(threads)
        self._sink: Sink = AtOnce(self._threads)
        self._partials = Partials()
        self.plan_counts = PlanCounts()
        self._tally = np.zeros(2, np.int64)
        self._scratch = np.empty(0, np.float32)

    @property
    def threads(self) -> int:
        """How many threads share the work."""
        return self._threads.count

    @property
    def counts(self) -> BlockCounts:
        """Score tiles computed and skipped since the start, counted once for all heads."""
        return BlockCounts(int(self._tally[0]), int(self._tally[1]))

    def load_linear(
        self, parts: Sequence[HostWeight], mode: WeightMode, bias: NDArray[Any] | None = None
    ) -> PackedLinear:
        """Pack the parts as one matrix; raises FormatUnsupported for codes or groups that do not fit."""
        return pack_linear(parts, mode, bias)

    def load_gated(self, gate: HostWeight, up: HostWeight, mode: WeightMode) -> PackedLinear:
        """Pack the gate above its `up`; raises as `load_linear`."""
        return pack_linear([gate, up], mode, None)

    def load_array(self, values: NDArray[Any]) -> Floats:
        """The values as contiguous float32."""
        return np.ascontiguousarray(values, np.float32)

    def new_arena(self, layout: BlockLayout, layers: int, blocks: int) -> CpuArena:
        """Reserve a cache; memory is taken as blocks are written."""
        if not layout.format.quantized and layout.format.element != self.element:
            raise FormatUnsupported(
                f"the cpu backend keeps unquantized caches in float32, not {layout.format.element}"
            )
        return CpuArena(layout, layers, blocks)

    def embed(self, table: PackedLinear, token_ids: NDArray[np.int32], scale: float) -> Floats:
        """Rows `token_ids` times `scale`. Raises IndexError for an id outside the table."""
        self._sink.before(partial(_check_ids, token_ids, table.rows))
        rows, out = len(token_ids), self._sink.blank(len(token_ids), table.columns)
        tasks, chunk = _cut(rows, table.columns)
        code = embed_code(table.bits, table.half, table.floats)
        codes, affine = address(table.codes), address(table.affine)
        places = codes, affine, table.group, table.columns, address(token_ids), address(out)
        self._sink.do(out.size, operation(code, tasks, *places, rows, chunk, real(scale)))
        return out

    def rms_norm(self, x: Floats, weight: Floats, eps: float) -> Floats:
        """`x / sqrt(mean(x^2) + eps) * weight`."""
        out = self._sink.blank(*x.shape)
        tasks, chunk = _cut(*x.shape)
        places = address(x), address(weight), address(out)
        norm = operation(norm_code(), tasks, *places, *x.shape, chunk, real(eps))
        self._sink.do(x.size, norm, makes=out)
        return out

    def add_rms_norm(self, x: Floats, y: Floats, weight: Floats, eps: float) -> tuple[Floats, Floats]:
        """`x + y` and its norm, in one pass."""
        summed, out = self._sink.blank(*x.shape), self._sink.blank(*x.shape)
        tasks, chunk = _cut(*x.shape)
        places = address(x), address(y), address(weight), address(summed), address(out)
        norm = operation(add_norm_code(), tasks, *places, *x.shape, chunk, real(eps))
        self._sink.do(x.size, norm, makes=out)
        return summed, out

    def linear(self, x: Floats, weight: PackedLinear, batch: StepBatch | None = None) -> Floats:
        """`x @ weight.T (+ bias)`."""
        rows, out = len(x), self._sink.blank(len(x), weight.width)
        panels = weight.width // PANEL
        chunk = panels_of_task(panels, rows, self.threads)
        result = address(out), panels, chunk
        if weight.floats:
            matrix = address(weight.codes), address(weight.affine), weight.group
            places = address(x), rows, weight.columns, *matrix, *result
            product = operation(scaled_rows_code(), -(-panels // chunk), *places)
            self._sink.do(rows * weight.codes.size, product)
        elif weight.bits != 32:
            code = coded_rows_code(weight.bits, weight.segment, weight.half)
            records = self._sink.rounded(x)
            matrix = address(weight.codes), address(weight.affine), weight.group
            product = operation(
                code, -(-panels // chunk), address(records), rows, weight.columns, *matrix, *result
            )
            self._sink.do(rows * weight.codes.size, product)
        elif rows <= FEW:
            places = address(x), rows, weight.columns, address(weight.codes), *result
            self._sink.do(rows * weight.codes.size, operation(few_rows_code(), -(-panels // chunk), *places))
        else:
            self._threads.claim()
            many_rows(x, weight.codes, out, self.threads)
        if weight.width == weight.rows and weight.bias is None:
            return out
        trimmed = self._sink.blank(rows, weight.rows)
        tasks, chunk = _cut(rows, weight.rows)
        bias = 0 if weight.bias is None else address(weight.bias)
        places = address(out), weight.width, address(trimmed), weight.rows, rows, chunk, bias
        self._sink.do(trimmed.size, operation(trim_code(), tasks, *places))
        return trimmed

    def gated_linear(
        self, x: Floats, weight: PackedLinear, activation: Activation, batch: StepBatch | None = None
    ) -> Floats:
        """`activation(gate) * up` of the product with both."""
        return self.gate(self.linear(x, weight, batch), activation)

    def gate(self, gate_up: Floats, activation: Activation) -> Floats:
        """`activation(left half) * right half`."""
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out = self._sink.blank(rows, width)
        pieces = max(1, width // CHUNK)
        code = gate_code(activation == "gelu_tanh")
        columns = -(-width // pieces // LANES) * LANES
        self._sink.do(
            out.size,
            operation(code, rows * pieces, address(gate_up), address(out), rows, width, columns, pieces),
            makes=out,
        )
        return out

    def rope_append(
        self,
        qkv: Floats,
        batch: StepBatch,
        arena: CpuArena,
        layer: int,
        spec: AttentionSpec,
        rope: RopeTable,
        norms: tuple[Floats, Floats, float] | None,
    ) -> Floats:
        """Norm, rope, quantize into the arena; returns q. The bytes are those of `quant.codec`."""
        rows, out = len(qkv), self._sink.blank(len(qkv), spec.heads * spec.head_dim)
        fmt, (tasks, chunk) = arena.layout.format, _cut(len(qkv), qkv.shape[1])
        pieces = spec.kv_heads if chunk == 1 else 1
        turned = address(rope.cos), address(rope.sin), rope.cos.shape[1]
        weights = (0, 0, real(0)) if norms is None else (address(norms[0]), address(norms[1]), real(norms[2]))
        code = append_code(fmt.name, spec.head_dim)
        places = address(batch.positions), address(batch.row_starts), *_tables(batch), *turned, *weights
        heads = spec.heads, spec.kv_heads, address(out), rows, chunk, pieces
        place = arena.place(layer)
        self._sink.do(qkv.size, operation(code, tasks * pieces, address(qkv), *places, *place, *heads))
        return out

    def attention(
        self, q: Floats, batch: StepBatch, arena: CpuArena, layer: int, spec: AttentionSpec
    ) -> Floats:
        """Attention over the arena: prompts tile by tile, other sequences' one row from the codes."""
        out = self._sink.blank(*q.shape)
        if not batch.prompts.all():
            self._attend_rows(q, batch, arena, layer, spec, out)
        if batch.prompt_numbers:
            self._attend_prompts(q, batch, arena, layer, spec, out)
        return out

    def _attend_rows(
        self, q: Floats, batch: StepBatch, arena: CpuArena, layer: int, spec: AttentionSpec, out: Floats
    ) -> None:
        self._partials.reserve(batch.lengths, spec)
        shape = arena.layout.format.name, spec.head_dim, spec.heads // spec.kv_heads
        starts, opens = self._sink.numbers(batch.sequences + 1), self._sink.numbers(batch.sequences)
        row_starts, lengths = address(batch.row_starts), address(batch.lengths)
        prompts = address(batch.prompts) if batch.prompt_numbers else 0
        work, partials = (address(starts), address(opens)), address(self._partials.places)
        window = spec.window or NO_WINDOW
        self._sink.do(
            q.size * int(batch.lengths.max()),
            operation(
                divide_code(), 1, prompts, lengths, batch.sequences, window, spec.kv_heads, *work,
                address(self._tally),
            ),
            operation(
                attend_code(*shape), starts[batch.sequences :], address(q), row_starts, lengths,
                *_tables(batch), *work, *arena.place(layer), spec.kv_heads, real(spec.scale), partials,
            ),
            operation(
                merge_code(*shape), batch.sequences * spec.kv_heads, row_starts, address(starts),
                spec.kv_heads, partials, address(out), len(q),
            ),
            makes=out if spec.heads // spec.kv_heads * spec.head_dim % COLUMNS == 0 else None,
        )  # fmt: skip

    def _attend_prompts(
        self, q: Floats, batch: StepBatch, arena: CpuArena, layer: int, spec: AttentionSpec, out: Floats
    ) -> None:
        self._threads.claim()
        fmt, group = arena.layout.format, spec.heads // spec.kv_heads
        window, scale = spec.window or NO_WINDOW, np.float32(spec.scale)
        place = arena.cache, layer * arena.layer_items, arena.block_items, arena.places
        expand = expand_kernel(fmt.name, spec.head_dim)
        for s in batch.prompt_numbers:
            row, rows = int(batch.row_starts[s]), int(batch.row_starts[s + 1] - batch.row_starts[s])
            length = int(batch.lengths[s])
            position = length - rows
            first = max(0, position - window + 1) // BLOCK_TOKENS
            keys, values = self._panels(-(-length // BLOCK_TOKENS) - first, spec.head_dim)
            for head in range(spec.kv_heads):
                expand(*place, batch.block_tables[s], first, length, head, keys, values, self.threads)
                attend(
                    q.reshape(-1), row, rows, position, keys, values, first, head * group, group, spec.heads,
                    window, scale, out.reshape(-1), self._tally, head == 0, self.threads,
                )  # fmt: skip

    def logits(self, x: Floats, head: PackedLinear, rows: NDArray[np.int32]) -> Floats:
        """float32 logits of the given rows."""
        return self.linear(x if len(rows) == len(x) and (rows == np.arange(len(x))).all() else x[rows], head)

    def record(self, step: Step, rows: int, arena: CpuArena) -> RecordedStep:
        """The operations of `step` as one program; for many rows, `step` itself."""
        if rows > FEW:
            return partial(step, self)

        def run(recorder: Recorder, partials: Partials, batch: StepBatch) -> Floats:
            recording = copy(self)
            recording._sink, recording._partials = recorder, partials
            return step(recording, batch)

        return Recording(run, rows, arena, self._threads)

    def new_drawing(self, vocabulary: int, places: int) -> None:
        """None: a processor draws as the host does."""

    def warm(self, shapes: Mapping[str, Any]) -> None:
        """Nothing: kernels compile, or come from the cache, in the steps that the decoder warms up with."""

    def _panels(self, blocks: int, dim: int) -> tuple[Floats, Floats]:
        """Scratch for one kv head's widened keys and values, kept from call to call."""
        padded = -(-dim // LANES) * LANES
        split, size = blocks * dim * BLOCK_TOKENS, blocks * (dim + padded) * BLOCK_TOKENS
        if len(self._scratch) < size:
            self._scratch = np.empty(size, np.float32)
        keys, values = self._scratch[:split], self._scratch[split:size]
        return keys.reshape(blocks, dim, BLOCK_TOKENS), values.reshape(blocks, BLOCK_TOKENS, padded)


def _cut(rows: int, width: int) -> tuple[int, int]:
    """Tasks, and rows of each, of an operation on rows of `width` elements."""
    chunk = max(1, CHUNK // width)
    return -(-rows // chunk), chunk


def _tables(batch: StepBatch) -> tuple[int, int]:
    """Address and width of the block tables."""
    return address(batch.block_tables), batch.block_tables.shape[1]


def _check_ids(token_ids: NDArray[np.int32], rows: int) -> None:
    if len(token_ids) and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < rows:
        raise IndexError(f"token ids must lie in 0..{rows - 1}")
