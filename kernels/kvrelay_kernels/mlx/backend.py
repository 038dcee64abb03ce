"""The kernel interface on MLX's own operations."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.interface import (
    Activation,
    Arena,
    AttentionSpec,
    BlockCounts,
    HostWeight,
    RecordedStep,
    RopeTable,
    Step,
    StepBatch,
    WeightMode,
)
from kvrelay_kernels.mlx.arena import TYPES, MlxArena
from kvrelay_kernels.mlx.attention import attend
from kvrelay_kernels.mlx.linear import MlxLinear, pack
from kvrelay_kernels.mlx.rotation import rotate
from kvrelay_kernels.plans import PlanCounts
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout
from kvrelay_kernels.quant.formats import Element


class MlxBackend:
    """See `Backend` in the kernel interface.

    Activations are `element`s; norms and rope run in float32 inside. By default that is bfloat16 on
    Apple's GPUs (Gemma's activations overflow float16), and float32 on MLX's CPU build, which serves for
    tests. MLX sets its own number of threads: `threads` is not used.
    """

    name = "mlx"
    chunk_tokens = 512

    def __init__(self, threads: int = 1, element: Element | None = None) -> None:
        self.element: Element = element or ("bfloat16" if mx.metal.is_available() else "float32")
        self.counts = BlockCounts()
        self.plan_counts = PlanCounts()
        self._type = TYPES[self.element]

    def load_linear(
        self, parts: Sequence[HostWeight], mode: WeightMode, bias: NDArray[Any] | None = None
    ) -> MlxLinear:
        """See `Backend.load_linear`."""
        linear = pack(parts, mode, bias, self._type)
        mx.eval([value for value in vars(linear).values() if isinstance(value, mx.array)])
        return linear

    def load_gated(self, gate: HostWeight, up: HostWeight, mode: WeightMode) -> MlxLinear:
        """See `Backend.load_gated`: the gate above its `up`."""
        return self.load_linear([gate, up], mode)

    def load_array(self, values: NDArray[Any]) -> mx.array:
        """See `Backend.load_array`; float32, since these are what norms and rope multiply with."""
        return mx.array(np.asarray(values, np.float32))

    def new_arena(self, layout: BlockLayout, layers: int, blocks: int) -> MlxArena:
        """See `Backend.new_arena`."""
        return MlxArena(layout, layers, blocks)

    def embed(self, table: MlxLinear, token_ids: NDArray[np.int32], scale: float) -> mx.array:
        """See `Backend.embed`."""
        return table.rows(mx.array(token_ids)).astype(self._type) * scale

    def rms_norm(self, x: mx.array, weight: mx.array, eps: float) -> mx.array:
        """See `Backend.rms_norm`."""
        return mx.fast.rms_norm(x, weight.astype(x.dtype), eps)

    def add_rms_norm(
        self, x: mx.array, y: mx.array, weight: mx.array, eps: float
    ) -> tuple[mx.array, mx.array]:
        """See `Backend.add_rms_norm`."""
        summed = x + y
        return summed, self.rms_norm(summed, weight, eps)

    def linear(self, x: mx.array, weight: MlxLinear, batch: StepBatch | None = None) -> mx.array:
        """See `Backend.linear`."""
        return weight.apply(x)

    def gated_linear(
        self, x: mx.array, weight: MlxLinear, activation: Activation, batch: StepBatch | None = None
    ) -> mx.array:
        """See `Backend.gated_linear`; the products are rounded."""
        left, right = mx.split(self.linear(x, weight, batch), 2, axis=-1)
        if activation == "silu":
            return left * mx.sigmoid(left) * right
        inner = math.sqrt(2 / math.pi) * (left + 0.044715 * left * left * left)
        return 0.5 * left * (1 + mx.tanh(inner)) * right

    def rope_append(
        self,
        qkv: mx.array,
        batch: StepBatch,
        arena: Arena,
        layer: int,
        spec: AttentionSpec,
        rope: RopeTable,
        norms: tuple[mx.array, mx.array, float] | None,
    ) -> mx.array:
        """See `Backend.rope_append`."""
        rows = batch.rows
        heads = qkv.reshape(rows, spec.heads + 2 * spec.kv_heads, spec.head_dim)
        q, k, v = mx.split(heads, [spec.heads, spec.heads + spec.kv_heads], axis=1)
        if norms is not None:
            q, k = self.rms_norm(q, norms[0], norms[2]), self.rms_norm(k, norms[1], norms[2])
        at = mx.array(batch.positions)
        cos, sin = rope.cos[at][:, None], rope.sin[at][:, None]
        sequences = np.repeat(np.arange(batch.sequences), np.diff(batch.row_starts))
        blocks = batch.block_tables[sequences, batch.positions // BLOCK_TOKENS]
        offsets = batch.positions % BLOCK_TOKENS
        q, k = _turn(q, cos, sin), _turn(k, cos, sin)
        if arena.layout.format.quantized:
            q, k = rotate(q), rotate(k)
        _own(arena).append(layer, mx.array(blocks), mx.array(offsets), k, v)
        return q.astype(self._type).reshape(rows, spec.heads * spec.head_dim)

    def attention(
        self, q: mx.array, batch: StepBatch, arena: Arena, layer: int, spec: AttentionSpec
    ) -> mx.array:
        """See `Backend.attention`."""
        return attend(q, batch, _own(arena), layer, spec, self.counts)

    def logits(self, x: mx.array, head: MlxLinear, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        """See `Backend.logits`."""
        return np.array(head.apply(x[mx.array(rows)]).astype(mx.float32))

    def record(self, step: Step, rows: int, arena: Arena) -> RecordedStep:
        """`step` itself: MLX builds its graph of operations anew in each step."""
        return partial(step, self)

    def new_drawing(self, vocabulary: int, places: int) -> None:
        """None: MLX gives logits to the host in each step."""

    def warm(self, shapes: Mapping[str, Any]) -> None:
        """Nothing of its own to compile: MLX loads its kernels when the decoder's warm-up steps run them."""


def _turn(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate-half rope in float32."""
    left, right = mx.split(x.astype(mx.float32), 2, axis=-1)
    return mx.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def _own(arena: Arena) -> MlxArena:
    if not isinstance(arena, MlxArena):
        raise TypeError(f"the MLX backend needs its own arena, not {type(arena).__name__}")
    return arena
