"""What a backend must provide: the one set of operations that the decoder's forward pass is written in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.plans import PlanCounts
from kvrelay_kernels.quant import AffineWeight, BlockLayout
from kvrelay_kernels.quant.formats import Element

Array = Any
"""An array of the backend's own library; activations are `[rows, width]`."""

Linear = Any
"""A matrix that a backend has packed for its own reads."""

HostWeight = NDArray[Any] | AffineWeight
"""A weight as the loaders give it: float16/bfloat16/float32, or affine codes."""

WeightMode = Literal["auto", "float", "int8", "int4"]
"""`auto` keeps the codes of a quantized file as they are (the same values, fewer bytes)."""

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class StepBatch:
    """One step's rows: the new tokens of all sequences, one sequence behind the other.

    A decode step has one row a sequence, a prefill step a chunk of each; both may be mixed.
    All arrays are int32 on the host.
    """

    token_ids: NDArray[np.int32]
    """`[rows]`"""
    positions: NDArray[np.int32]
    """`[rows]`: position of each row in its sequence."""
    row_starts: NDArray[np.int32]
    """`[sequences + 1]`: rows `row_starts[s]` to `row_starts[s + 1]` belong to sequence s."""
    lengths: NDArray[np.int32]
    """`[sequences]`: keys of each sequence after this step, its new rows included."""
    block_tables: NDArray[np.int32]
    """`[sequences, blocks]`: arena blocks of each sequence in order; entries past its length are not read."""
    logit_rows: NDArray[np.int32]
    """`[n]`: the rows whose logits are wanted."""
    read: NDArray[np.bool_] | None = None
    """`[sequences]`: which sequences are read as prompts, in tiles; the others have one row each.

    The two may sum attention in another order. A token goes the same way whenever it is computed anew, so
    that an answer goes on after a fault with the same bits. None: sequences with several rows are prompts.
    """

    @cached_property
    def prompts(self) -> NDArray[np.bool_]:
        """`[sequences]`: `read`, or what it is where it was not told."""
        return np.diff(self.row_starts) > 1 if self.read is None else self.read

    @cached_property
    def prompt_numbers(self) -> list[int]:
        """The sequences that are prompts."""
        return np.flatnonzero(self.prompts).tolist()

    @cached_property
    def plain(self) -> bool:
        """Whether this is a step of decode alone: one row a sequence, none a prompt, logits of all."""
        every = np.arange(self.rows)
        return (
            self.rows == self.sequences
            and not self.prompts.any()
            and np.array_equal(self.row_starts[:-1], every)
            and np.array_equal(self.logit_rows, every)
        )

    @property
    def rows(self) -> int:
        """New tokens in this step."""
        return len(self.token_ids)

    @property
    def sequences(self) -> int:
        """Sequences in this step."""
        return len(self.lengths)


@dataclass(frozen=True)
class AttentionSpec:
    """What one layer's attention needs to know, besides the batch."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    """A query sees the keys `position - window < key <= position`; None: all keys up to its own."""


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines, `[context, rotated / 2]`: element i is turned with element i + rotated / 2."""

    cos: Array
    sin: Array


@dataclass
class BlockCounts:
    """Score tiles (a query tile x a KV block) that attention met: the masked ones cost nothing."""

    computed: int = 0
    skipped: int = 0


class Arena(Protocol):
    """A fixed-capacity KV cache: `[layers, blocks]` blocks of one layout, allocated once."""

    layout: BlockLayout
    layers: int
    blocks: int

    def read_block(self, layer: int, block: int) -> memoryview:
        """The bytes of a block, as they go on the wire; a view where memory is the host's."""
        ...

    def write_block(self, layer: int, block: int, payload: memoryview) -> None:
        """Put a block's bytes, as they came off the wire, where attention will read them."""
        ...


Logits = NDArray[np.float32]
"""On the host, `[rows, vocabulary]`."""

RecordedStep = Callable[[StepBatch], Logits]
Step = Callable[[Any, StepBatch], Logits]
"""A decoder's step, written in the operations of the Backend that is its first argument."""


class Backend(Protocol):
    """The operations of a decoder on one device. Inputs are never modified, except the arena."""

    name: str
    element: Element
    """What an unquantized cache holds on this backend."""
    counts: BlockCounts
    chunk_tokens: int
    """Rows of a prompt that fill the device: larger steps gain little."""

    @property
    def plan_counts(self) -> PlanCounts:
        """What became of the plans it wanted; nothing where it compiles none."""
        ...

    def load_linear(
        self, parts: Sequence[HostWeight], mode: WeightMode, bias: NDArray[Any] | None = None
    ) -> Linear:
        """Pack the parts, rows below each other, as one matrix `[sum of rows, columns]`."""
        ...

    def load_array(self, values: NDArray[Any]) -> Array:
        """A small array (norm weight, rope table) on the device, in the type the backend computes in."""
        ...

    def new_arena(self, layout: BlockLayout, layers: int, blocks: int) -> Arena:
        """Allocate a cache. Raises MemoryError or FormatUnsupported."""
        ...

    def embed(self, table: Linear, token_ids: NDArray[np.int32], scale: float) -> Array:
        """Rows `token_ids` of `table` times `scale`: `[rows, hidden]`."""
        ...

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """`x / sqrt(mean(x^2) + eps) * weight` along the last dimension."""
        ...

    def add_rms_norm(self, x: Array, y: Array, weight: Array, eps: float) -> tuple[Array, Array]:
        """`x + y`, and `rms_norm` of it."""
        ...

    def linear(self, x: Array, weight: Linear) -> Array:
        """`x @ weight.T (+ bias)`: `[rows, weight rows]`."""
        ...

    def gate(self, gate_up: Array, activation: Activation) -> Array:
        """`activation(left half) * right half`: `[rows, width / 2]`."""
        ...

    def rope_append(
        self,
        qkv: Array,
        batch: StepBatch,
        arena: Arena,
        layer: int,
        spec: AttentionSpec,
        rope: RopeTable,
        norms: tuple[Array, Array, float] | None,
    ) -> Array:
        """Norm and rope q and k, quantize k and v into the arena's blocks.

        `norms` are `(q weight, k weight, eps)`, applied to each head; None: none.
        `qkv` is `[rows, (heads + 2 * kv_heads) * head_dim]`; returns q, `[rows, heads * head_dim]`.
        Row r of sequence s at position p lands in block `block_tables[s, p // 64]` at token p % 64.
        """
        ...

    def attention(self, q: Array, batch: StepBatch, arena: Arena, layer: int, spec: AttentionSpec) -> Array:
        """Causal (and windowed) attention of each row over its sequence's keys in the arena.

        Every key, also those of this step's rows, is read back from the arena, so that the result does
        not depend on how a prompt was cut into chunks. Returns `[rows, heads * head_dim]`.
        """
        ...

    def logits(self, x: Array, head: Linear, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        """float32 logits on the host of the given rows: `[len(rows), vocabulary]`."""
        ...

    def record(self, step: Step, rows: int, arena: Arena) -> RecordedStep:
        """What computes `step(self, batch)` for batches of `rows` sequences with one row each (`plain` ones).

        `step` calls the same operations for every such batch, and ends in `logits` of all rows. A backend may
        call it once, with a stand-in for itself that takes the operations down, and repeat these with no work
        of the host between them. The result may be overwritten by the next call.
        """
        ...

    def warm(self, shapes: Mapping[str, Any]) -> None:
        """Compile and load whatever the first request would otherwise wait for."""
        ...
