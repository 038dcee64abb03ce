"""What a backend must provide: the one set of operations that the decoder's forward pass is written in."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.plans import PlanCounts
from kvrelay_kernels.quant import BlockLayout, CodedWeight
from kvrelay_kernels.quant.formats import Element

Array = Any
"""An array of the backend's own library; activations are `[rows, width]`."""

Linear = Any
"""A matrix that a backend has packed for its own reads."""

HostWeight = NDArray[Any] | CodedWeight
"""A weight as the loaders give it: float16/bfloat16/float32, or codes."""

WeightMode = Literal["auto", "float", "int8", "int4", "fp8"]
"""`auto` keeps the codes of a quantized file as they are (the same values, fewer bytes)."""

Activation = Literal["silu", "gelu_tanh"]


FROM_DEVICE = -1
"""In place of a token that the host has not read: the device will have drawn it when the step begins."""
NOT_FINITE = -2
"""In place of a token: the logits it would be drawn from hold NaN or infinity."""
NOWHERE = -1
"""The place of a row that the device draws nothing for."""


@dataclass(frozen=True)
class StepBatch:
    """One step's rows: the new tokens of all sequences, one sequence behind the other.

    A decode step has one row a sequence, a prefill step a chunk of each; both may be mixed.
    All arrays are int32 on the host.
    """

    token_ids: NDArray[np.int32]
    """`[rows]`; FROM_DEVICE, in a step that a device draws for: the newest token at the row's place."""
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
    def runs(self) -> list[tuple[int, int, bool]]:
        """The rows in stretches of prompts alone and of others alone: `(begin, end, prompts)`."""
        of_rows = np.repeat(self.prompts, np.diff(self.row_starts))
        cuts = [0, *(np.flatnonzero(np.diff(of_rows)) + 1).tolist(), self.rows]
        return [(begin, end, bool(of_rows[begin])) for begin, end in itertools.pairwise(cuts)]

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
    routes: Counter[str] = field(default_factory=Counter[str])
    """Calls for prompts, one a layer and step, by the kernel that took them; none where there is but one."""


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


@dataclass(frozen=True)
class Draw:
    """How a sequence's tokens are drawn; `model_runtime.sampler.sample` says what that means."""

    temperature: float
    """0: the likeliest token is taken."""
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    ending_ids: Sequence[int]
    ending_from: int
    """Tokens of prompt and answer from which on `ending_ids` may be drawn."""


class Pending(Protocol):
    """A step that a device was told to take, and whose tokens come when it has."""

    @property
    def done(self) -> bool:
        """Whether `tokens` need not wait."""
        ...

    def tokens(self) -> NDArray[np.int32]:
        """Wait, and give the drawn tokens: `[rows]`, NOT_FINITE where a row's logits hold NaN or infinity.

        Rows at NOWHERE hold nothing of meaning.
        """
        ...

    def logits(self, rows: Sequence[int]) -> Logits:
        """Wait, and give the logits of some rows that lie NOWHERE, before the next step is launched."""
        ...


class DrawnStep(Protocol):
    """A step that ends in tokens, recorded."""

    def __call__(self, batch: StepBatch, places: NDArray[np.int32]) -> Pending:
        """Launch a `plain` step whose rows are the sequences at these places, `[rows]`; does not wait."""
        ...

    def shapes(self, blocks: int) -> Sequence[tuple[int, int]]:
        """Rows and table widths, up to `blocks`, that are taken down: all others are filled up to these."""
        ...


class Drawing(Protocol):
    """Sequences whose tokens a device draws: it keeps the newest token and the counts of each at a place.

    Steps are launched and places taken in order: what is told later happens later on the device.
    """

    def join(self, place: int, draw: Draw, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> None:
        """Let a sequence have a place whose former one is in no step any more."""
        ...

    def record(self, step: Step, arena: Arena) -> DrawnStep:
        """As `Backend.record`, for any number of rows up to that of places."""
        ...


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

    def load_gated(self, gate: HostWeight, up: HostWeight, mode: WeightMode) -> Linear:
        """Pack the two matrices of a gated layer, `[width, columns]` each, for `gated_linear`."""
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

    def linear(self, x: Array, weight: Linear, batch: StepBatch | None = None) -> Array:
        """`x @ weight.T (+ bias)`: `[rows, weight rows]`.

        Rows of `batch` that are prompts may be summed in another order than the others (`StepBatch.read`).
        None: the backend may choose by their number.
        """
        ...

    def gated_linear(
        self, x: Array, weight: Linear, activation: Activation, batch: StepBatch | None = None
    ) -> Array:
        """`activation(x @ gate.T) * (x @ up.T)`: `[rows, width]`; `weight` and `batch` as for `linear`.

        The products may be rounded to the backend's type before the activation, or go into it in float32.
        """
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

    def new_drawing(self, vocabulary: int, places: int) -> Drawing | None:
        """Room to draw tokens for so many sequences at a time; None: this backend leaves that to the host.

        Raises MemoryError.
        """
        ...

    def warm(self, shapes: Mapping[str, Any]) -> None:
        """Compile and load whatever the first request would otherwise wait for."""
        ...
