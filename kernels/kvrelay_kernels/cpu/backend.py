"""The operations of a decoder on an ordinary processor."""

from collections.abc import Mapping, Sequence
from threading import get_ident
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cpu.arena import CpuArena
from kvrelay_kernels.cpu.decode import decode_kernel
from kvrelay_kernels.cpu.prefill import LANES, attend, expand_kernel
from kvrelay_kernels.cpu.products import FEW_ROWS, MANY_ROWS
from kvrelay_kernels.cpu.rope import append_kernel
from kvrelay_kernels.cpu.rows import ADD_NORM, GATE, GATHER, NORM
from kvrelay_kernels.cpu.threads import load_tbb
from kvrelay_kernels.cpu.weights import PackedLinear, pack_linear
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import (
    Activation,
    AttentionSpec,
    BlockCounts,
    HostWeight,
    RopeTable,
    Step,
    StepBatch,
    WeightMode,
)
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout
from kvrelay_kernels.quant.formats import Element

Floats = NDArray[np.float32]

FEW = 64
"""Up to so many rows, weights are widened in registers; above, once a thread into scratch panels. Measured on
one core, the two differ by less than 5% from 24 to 64 rows; both sum alike, so the choice changes no bit."""
ALONE = 65536
"""Elements below which one thread is done before another has been woken."""
NO_WINDOW = 2**31 - 1
NO_NORM = (np.empty(0, np.float32), np.empty(0, np.float32), np.float32(0))


class CpuBackend:
    """Runs on `threads` cores; one step at a time. Activations are float32 `[rows, width]`, C order."""

    name = "cpu"
    element: Element = "float32"

    def __init__(self, threads: int) -> None:
        load_tbb()
        self.threads = max(1, min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        self._tally = np.zeros(2, np.int64)
        self._scratch = np.empty(0, np.float32)
        self._caller = 0

    @property
    def counts(self) -> BlockCounts:
        """Score tiles computed and skipped since the start, counted once for all heads."""
        return BlockCounts(int(self._tally[0]), int(self._tally[1]))

    def load_linear(
        self, parts: Sequence[HostWeight], mode: WeightMode, bias: NDArray[Any] | None = None
    ) -> PackedLinear:
        """Pack the parts as one matrix; raises FormatUnsupported for codes or groups that do not fit."""
        return pack_linear(parts, mode, bias)

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
        if len(token_ids) and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < table.rows:
            raise IndexError(f"token ids must lie in 0..{table.rows - 1}")
        out = self._blank(len(token_ids), table.columns)
        GATHER[table.bits](table.codes, table.affine, table.group, token_ids, np.float32(scale), out)
        return out

    def rms_norm(self, x: Floats, weight: Floats, eps: float) -> Floats:
        """`x / sqrt(mean(x^2) + eps) * weight`."""
        out = self._blank(*x.shape)
        NORM[self._spread(x)](x, weight, eps, out, self._chunks(x))
        return out

    def add_rms_norm(self, x: Floats, y: Floats, weight: Floats, eps: float) -> tuple[Floats, Floats]:
        """`x + y` and its norm, in one pass."""
        summed, out = self._blank(*x.shape), self._blank(*x.shape)
        ADD_NORM[self._spread(x)](x, y, weight, eps, summed, out, self._chunks(x))
        return summed, out

    def linear(self, x: Floats, weight: PackedLinear) -> Floats:
        """`x @ weight.T (+ bias)`."""
        self._claim_threads()
        out = self._blank(len(x), weight.width)
        kernels = FEW_ROWS if len(x) <= FEW else MANY_ROWS
        kernels[weight.bits](x, weight.codes, weight.affine, weight.group, out, self.threads)
        if weight.width != weight.rows:
            out = np.ascontiguousarray(out[:, : weight.rows])
        if weight.bias is not None:
            out += weight.bias
        return out

    def gate(self, gate_up: Floats, activation: Activation) -> Floats:
        """`activation(left half) * right half`."""
        out = self._blank(len(gate_up), gate_up.shape[1] // 2)
        GATE[self._spread(gate_up), activation](gate_up, out, self._chunks(gate_up))
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
        """Norm, rope, quantize into the arena; returns q. The bytes are those of `quant.affine.quantize`."""
        out = self._blank(len(qkv), spec.heads * spec.head_dim)
        fmt = arena.layout.format
        kernel = append_kernel(fmt.bits, fmt.group, spec.head_dim, self._spread(qkv))
        q_norm, k_norm, eps = norms or NO_NORM
        kernel(
            qkv.reshape(-1), batch.positions, batch.row_starts, batch.block_tables, rope.cos, rope.sin,
            q_norm, k_norm, np.float32(eps),
            arena.cache, layer * arena.layer_items, arena.block_items, arena.places,
            spec.heads, spec.kv_heads, out.reshape(-1), self._chunks(qkv),
        )  # fmt: skip
        return out

    def attention(
        self, q: Floats, batch: StepBatch, arena: CpuArena, layer: int, spec: AttentionSpec
    ) -> Floats:
        """Attention over the arena: prompts tile by tile, other sequences' one row from the codes."""
        self._claim_threads()
        out = self._blank(*q.shape)
        fmt, group = arena.layout.format, spec.heads // spec.kv_heads
        window, scale = spec.window or NO_WINDOW, np.float32(spec.scale)
        place = arena.cache, layer * arena.layer_items, arena.block_items, arena.places
        decode_kernel(fmt.bits, fmt.group, spec.head_dim, group)(
            q.reshape(-1), batch.prompts, batch.row_starts, batch.lengths, batch.block_tables, *place,
            spec.kv_heads, window, scale, out.reshape(-1), self._tally, self.threads,
        )  # fmt: skip
        if not batch.prompt_numbers:
            return out
        expand = expand_kernel(fmt.bits, fmt.group, spec.head_dim)
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
        return out

    def logits(self, x: Floats, head: PackedLinear, rows: NDArray[np.int32]) -> Floats:
        """float32 logits of the given rows."""
        return self.linear(x if len(rows) == len(x) and (rows == np.arange(len(x))).all() else x[rows], head)

    def record(self, step: Step, rows: int, arena: CpuArena) -> Step:
        """`step` itself."""
        return step

    def warm(self, shapes: Mapping[str, Any]) -> None:
        """Nothing: kernels compile, or come from the cache, in the steps that the decoder warms up with."""

    def _blank(self, rows: int, width: int) -> Floats:
        return np.empty((rows, width), np.float32)

    def _panels(self, blocks: int, dim: int) -> tuple[Floats, Floats]:
        """Scratch for one kv head's widened keys and values, kept from call to call."""
        padded = -(-dim // LANES) * LANES
        split, size = blocks * dim * BLOCK_TOKENS, blocks * (dim + padded) * BLOCK_TOKENS
        if len(self._scratch) < size:
            self._scratch = np.empty(size, np.float32)
        keys, values = self._scratch[:split], self._scratch[split:size]
        return keys.reshape(blocks, dim, BLOCK_TOKENS), values.reshape(blocks, BLOCK_TOKENS, padded)

    def _spread(self, x: Floats) -> bool:
        return self.threads > 1 and x.size >= ALONE

    def _chunks(self, x: Floats) -> int:
        if not self._spread(x):
            return 1
        self._claim_threads()
        return self.threads

    def _claim_threads(self) -> None:
        """Numba counts threads for each calling thread apart."""
        caller = get_ident()
        if caller != self._caller:
            numba.set_num_threads(self.threads)
            self._caller = caller
