"""Every operation as its formula, in float64, one sequence and one head at a time."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
from kvrelay_kernels.quant.codec import dequantize, quantize
from kvrelay_kernels.quant.formats import Element
from kvrelay_kernels.quant.rotation import rotate
from kvrelay_kernels.quant.weights import as_floats, in_mode

Doubles = NDArray[np.float64]
Matrix = tuple[Doubles, Doubles | None]


class ReferenceArena:
    """Blocks as byte arrays."""

    def __init__(self, layout: BlockLayout, layers: int, blocks: int) -> None:
        self.layout, self.layers, self.blocks = layout, layers, blocks
        self._bytes = np.zeros((layers, blocks, layout.block_bytes), np.uint8)

    def read_block(self, layer: int, block: int) -> memoryview:
        """A view of the block's bytes."""
        return memoryview(self._bytes[layer, block]).toreadonly()

    def write_block(self, layer: int, block: int, payload: memoryview) -> None:
        """Copy a block's bytes in. Raises ValueError where their number is not the layout's."""
        if payload.nbytes != self.layout.block_bytes:
            raise ValueError(f"a block has {self.layout.block_bytes} bytes, not {payload.nbytes}")
        self._bytes[layer, block] = np.frombuffer(payload, np.uint8)

    def frame(self, layer: int, name: str) -> NDArray[Any]:
        """One frame of all blocks of a layer, a writable view `[blocks, kv_heads, 64, width]`."""
        frame = self.layout.frame(name)
        data = self._bytes[layer, :, frame.offset : frame.offset + frame.nbytes]
        return data.view(frame.dtype).reshape(self.blocks, *frame.shape)

    def put(
        self, layer: int, blocks: NDArray[Any], tokens: NDArray[Any], side: str, vectors: Doubles
    ) -> None:
        """Store K or V of some rows, `[rows, kv_heads, head_dim]`: row r as a token of block `blocks[r]`."""
        fmt = self.layout.format
        if side == "v" and fmt.rotates_values:
            vectors = rotate(vectors)
        arrays = quantize(vectors, fmt) if fmt.quantized else {"values": vectors}
        for name, array in arrays.items():
            self.frame(layer, f"{side}_{name}")[blocks, :, tokens] = array

    def get(self, layer: int, table: NDArray[np.int32], length: int, side: str) -> Doubles:
        """The first `length` tokens of a sequence's K or V, `[kv_heads, length, head_dim]`."""
        fmt, blocks = self.layout.format, table[: -(-length // BLOCK_TOKENS)]
        arrays = {name: self.frame(layer, f"{side}_{name}")[blocks] for name in fmt.parts}
        found = dequantize(arrays, fmt) if fmt.quantized else arrays["values"]
        whole = np.concatenate(list(found), 1)[:, :length].astype(np.float64)
        return rotate(whole) if side == "v" and fmt.rotates_values else whole


class ReferenceBackend:
    """Slow and plain; activations are float64."""

    name = "reference"
    element: Element = "float32"
    chunk_tokens = 512

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self.counts = BlockCounts()
        self.plan_counts = PlanCounts()

    def load_linear(
        self, parts: Sequence[HostWeight], mode: WeightMode, bias: NDArray[Any] | None = None
    ) -> Matrix:
        """The float64 matrix, after the rounding that `mode` asks for."""
        matrices = [as_floats(in_mode(part, mode)) for part in parts]
        whole = np.concatenate(matrices).astype(np.float64)
        return whole, None if bias is None else np.asarray(bias, np.float64)

    def load_gated(self, gate: HostWeight, up: HostWeight, mode: WeightMode) -> Matrix:
        """The gate above its `up`."""
        return self.load_linear([gate, up], mode)

    def load_array(self, values: NDArray[Any]) -> Doubles:
        """The values as float64."""
        return np.asarray(values, np.float64)

    def new_arena(self, layout: BlockLayout, layers: int, blocks: int) -> ReferenceArena:
        """A cache of zeros."""
        if not layout.format.quantized and layout.format.element != self.element:
            raise FormatUnsupported(
                f"the reference keeps unquantized caches in float32, not {layout.format.element}"
            )
        return ReferenceArena(layout, layers, blocks)

    def embed(self, table: Matrix, token_ids: NDArray[np.int32], scale: float) -> Doubles:
        """Rows `token_ids` times `scale`."""
        return table[0][token_ids] * scale

    def rms_norm(self, x: Doubles, weight: Doubles, eps: float) -> Doubles:
        """`x / sqrt(mean(x^2) + eps) * weight`."""
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * weight

    def add_rms_norm(self, x: Doubles, y: Doubles, weight: Doubles, eps: float) -> tuple[Doubles, Doubles]:
        """`x + y` and its norm."""
        return x + y, self.rms_norm(x + y, weight, eps)

    def linear(self, x: Doubles, weight: Matrix, batch: StepBatch | None = None) -> Doubles:
        """`x @ weight.T (+ bias)`."""
        product = x @ weight[0].T
        return product if weight[1] is None else product + weight[1]

    def gated_linear(
        self, x: Doubles, weight: Matrix, activation: Activation, batch: StepBatch | None = None
    ) -> Doubles:
        """`activation(gate) * up` of the product with both."""
        return self.gate(self.linear(x, weight), activation)

    def gate(self, gate_up: Doubles, activation: Activation) -> Doubles:
        """`activation(left half) * right half`."""
        a, b = np.split(gate_up, 2, -1)
        if activation == "silu":
            return a / (1 + np.exp(-a)) * b
        return a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))) / 2 * b

    def rope_append(
        self,
        qkv: Doubles,
        batch: StepBatch,
        arena: ReferenceArena,
        layer: int,
        spec: AttentionSpec,
        rope: RopeTable,
        norms: tuple[Doubles, Doubles, float] | None,
    ) -> Doubles:
        """Norm, rope, quantize into the arena; returns q."""
        heads = qkv.reshape(len(qkv), -1, spec.head_dim)
        q, k, v = np.split(heads, [spec.heads, spec.heads + spec.kv_heads], 1)
        if norms:
            q, k = self.rms_norm(q, norms[0], norms[2]), self.rms_norm(k, norms[1], norms[2])
        q, k = self._turn(q, batch.positions, rope), self._turn(k, batch.positions, rope)
        if arena.layout.format.quantized:
            q, k = rotate(q), rotate(k)
        sequence = np.repeat(np.arange(batch.sequences), np.diff(batch.row_starts))
        blocks = batch.block_tables[sequence, batch.positions // BLOCK_TOKENS]
        for side, vectors in (("k", k), ("v", v)):
            arena.put(layer, blocks, batch.positions % BLOCK_TOKENS, side, vectors)
        return q.reshape(len(q), -1)

    def attention(
        self, q: Doubles, batch: StepBatch, arena: ReferenceArena, layer: int, spec: AttentionSpec
    ) -> Doubles:
        """softmax(q . k * scale) . v over the keys that each row sees."""
        out = np.empty_like(q)
        for s in range(batch.sequences):
            length = int(batch.lengths[s])
            keys, values = (arena.get(layer, batch.block_tables[s], length, side) for side in "kv")
            rows = slice(batch.row_starts[s], batch.row_starts[s + 1])
            behind = batch.positions[rows, None] - np.arange(length)
            seen = (behind >= 0) & (behind < (spec.window or length))
            for head in range(spec.heads):
                columns = slice(head * spec.head_dim, (head + 1) * spec.head_dim)
                kv = head * spec.kv_heads // spec.heads
                scores = np.where(seen, q[rows, columns] @ keys[kv].T * spec.scale, -np.inf)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                out[rows, columns] = weights @ values[kv] / weights.sum(-1, keepdims=True)
        return out

    def logits(self, x: Doubles, head: Matrix, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        """float32 logits of the given rows."""
        return self.linear(x[rows], head).astype(np.float32)

    def record(self, step: Step, rows: int, arena: ReferenceArena) -> RecordedStep:
        """`step` itself."""
        return partial(step, self)

    def new_drawing(self, vocabulary: int, places: int) -> None:
        """None: the sampler is the reference."""

    def warm(self, shapes: Mapping[str, Any]) -> None:
        """Nothing is compiled here."""

    @staticmethod
    def _turn(x: Doubles, positions: NDArray[np.int32], rope: RopeTable) -> Doubles:
        cos, sin = (np.asarray(side)[positions][:, None] for side in (rope.cos, rope.sin))
        half = cos.shape[-1]
        a, b, rest = np.split(x, [half, 2 * half], -1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)
