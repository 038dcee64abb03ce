"""The forward pass of all model families, written once over the kernel interface."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay.errors import ModelFileInvalid
from kvrelay_kernels.errors import NonFiniteActivations
from kvrelay_kernels.interface import (
    Arena,
    Array,
    AttentionSpec,
    Backend,
    Linear,
    Logits,
    RecordedStep,
    RopeTable,
    Step,
    StepBatch,
    WeightMode,
)
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout, CodedWeight, parse_format
from model_runtime.progress import Progress, silent
from model_runtime.rope import rope_angles
from model_runtime.steps import only_rows, sequence_steps
from model_runtime.token_steps import DeviceTokenSteps, HostTokenSteps, TokenSteps, finite_rows
from model_runtime.weights import EMBED, FINAL_NORM, HEAD, ROPE_FACTORS, Checkpoint, layer_tensor

OnLayer = Callable[[int], None]
"""Called with a layer's number once K and V of all rows of the step are in the arena."""


@dataclass(frozen=True)
class _Layer:
    """One layer's weights, packed by the backend."""

    attn_norm: Array
    qkv: Linear
    o: Linear
    ffn_norm: Array
    gate_up: Linear
    down: Linear
    qk_norms: tuple[Array, Array, float] | None
    post_attn_norm: Array | None
    post_ffn_norm: Array | None
    spec: AttentionSpec
    rope: RopeTable


class Decoder:
    """A model on one backend, ready to take steps. It keeps no state between them: that is the arena's."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        backend: Backend,
        weight_mode: WeightMode = "auto",
        context: int | None = None,
        progress: Progress = silent,
    ) -> None:
        """Read and pack all weights; `context` bounds positions more closely than the model does.

        Raises:
            ModelFileInvalid: a tensor has a type that it cannot have.
            FormatUnsupported: the backend cannot run this model or weight mode.
        """
        self.config = checkpoint.config
        self.backend = backend
        self.context = min(context or self.config.context, self.config.context)
        self._checkpoint = checkpoint
        self._mode: WeightMode = weight_mode
        config = self.config
        jobs = config.layers + 2
        progress("packing weights", 0, jobs)
        self._embed = self._linear([EMBED])
        self._head = self._embed if config.tied_embeddings else self._linear([HEAD])
        self._final_norm = self._norm(FINAL_NORM)
        progress("packing weights", 1, jobs)
        ropes = self._ropes()
        progress("packing weights", 2, jobs)
        self._layers: list[_Layer] = []
        for layer in range(config.layers):
            rope = ropes[0] if config.windows[layer] is None else ropes[1]
            self._layers.append(self._pack(layer, rope))
            progress("packing weights", layer + 3, jobs)
        self._recordings: tuple[Arena | None, dict[int, RecordedStep]] = None, {}

    def layout(self, kv_format: str) -> BlockLayout:
        """The layout of this model's KV blocks in a format such as `int8` or `none`.

        Raises:
            FormatUnsupported: there is no such format, or it does not fit the head dimension.
        """
        head_dim = self.config.head_dim
        return BlockLayout(
            parse_format(kv_format, head_dim, self.backend.element), self.config.kv_heads, head_dim
        )

    def new_arena(self, blocks: int, kv_format: str) -> Arena:
        """A cache of `blocks` blocks of 64 tokens in every layer.

        Raises:
            MemoryError: it does not fit.
            FormatUnsupported: as `layout`, or the backend cannot attend to this format.
        """
        return self.backend.new_arena(self.layout(kv_format), self.config.layers, blocks)

    def forward(self, batch: StepBatch, arena: Arena, on_layer: OnLayer | None = None) -> Logits:
        """Put K and V of all rows into the arena and return logits, `[len(logit_rows), vocabulary]`.

        Positions must be below `context`, and the block tables must cover each sequence's length.

        Raises:
            NonFiniteActivations: a row's logits hold NaN or infinity; the message names rows and sequences.
        """
        logits = self.logits(batch, arena, on_layer)
        _check_finite(logits, batch)
        return logits

    def logits(self, batch: StepBatch, arena: Arena, on_layer: OnLayer | None = None) -> Logits:
        """As `forward`, but NaN and infinity are left to the caller."""
        if batch.rows == 0:
            return np.empty((0, self.config.vocabulary), np.float32)
        if on_layer is None and batch.plain:
            return self._recorded(arena, batch.rows)(batch)
        return self._run(self.backend, batch, arena, on_layer)

    def new_token_steps(self, arena: Arena, places: int) -> TokenSteps:
        """Decode steps on an arena that end in tokens, for `places` sequences at a time.

        Raises:
            MemoryError: what a device keeps of the sequences does not fit.
        """
        drawing = self.backend.new_drawing(self.config.vocabulary, places)
        if drawing is None:
            return HostTokenSteps(self, arena)
        return DeviceTokenSteps(self, arena, drawing, places)

    def step(self, arena: Arena) -> Step:
        """The forward pass on an arena, for a backend to take down."""

        def step(backend: Backend, batch: StepBatch) -> Logits:
            return self._run(backend, batch, arena, None)

        return step

    def _recorded(self, arena: Arena, rows: int) -> RecordedStep:
        """The step of one row each for `rows` sequences, as the backend repeats it best."""
        if self._recordings[0] is not arena:
            self._recordings = arena, {}
        steps = self._recordings[1]
        if rows not in steps:
            steps[rows] = self.backend.record(self.step(arena), rows, arena)
        return steps[rows]

    def _run(self, backend: Backend, batch: StepBatch, arena: Arena, on_layer: OnLayer | None) -> Logits:
        config, eps, last = self.config, self.config.norm_eps, self.config.layers - 1
        norms = [layer.attn_norm for layer in self._layers] + [self._final_norm]
        x = backend.embed(self._embed, batch.token_ids, config.embedding_scale)
        h = backend.rms_norm(x, norms[0], eps)
        rows = batch.logit_rows
        for index, layer in enumerate(self._layers):
            qkv = backend.linear(h, layer.qkv, batch)
            q = backend.rope_append(qkv, batch, arena, index, layer.spec, layer.rope, layer.qk_norms)
            if on_layer is not None and index > 0:
                # A layer late: reading blocks waits for the device, which should have work meanwhile.
                on_layer(index - 1)
            if index == last and not batch.plain:
                # Behind the last append only the rows whose logits are wanted matter.
                if len(rows) == 0:
                    if on_layer is not None:
                        on_layer(last)
                    return np.empty((0, config.vocabulary), np.float32)
                kept, batch, rows = only_rows(batch)
                if kept is not None:
                    x, q = x[kept], q[kept]
            o = backend.linear(backend.attention(q, batch, arena, index, layer.spec), layer.o, batch)
            x, h = backend.add_rms_norm(x, self._post(backend, o, layer.post_attn_norm), layer.ffn_norm, eps)
            h = backend.gated_linear(h, layer.gate_up, config.activation, batch)
            down = self._post(backend, backend.linear(h, layer.down, batch), layer.post_ffn_norm)
            x, h = backend.add_rms_norm(x, down, norms[index + 1], eps)
        if on_layer is not None:
            on_layer(last)
        return backend.logits(h, self._head, rows)

    def warm(self, arena: Arena, chunk: int, sequences: int, progress: Progress = silent) -> None:
        """Run what requests will run, so that none waits for a compiler; the arena's contents are lost.

        That is a prompt's chunk of `chunk` tokens, a single row, and a step of `sequences` rows, as far
        as the arena holds them.
        """
        self.backend.warm({"layout": arena.layout, "chunk": chunk, "sequences": sequences})
        longest = min(chunk, self.context, arena.blocks * BLOCK_TOKENS)
        steps = [[longest], [1], [1] * max(1, min(sequences, arena.blocks))]
        for done, new_tokens in enumerate(steps):
            progress("warming up", done, len(steps))
            self.forward(sequence_steps(new_tokens, [0] * len(new_tokens))[0], arena)
        progress("warming up", len(steps), len(steps))

    def _post(self, backend: Backend, x: Array, norm: Array | None) -> Array:
        return x if norm is None else backend.rms_norm(x, norm, self.config.norm_eps)

    def _pack(self, layer: int, rope: RopeTable) -> _Layer:
        config = self.config
        spec = AttentionSpec(
            config.heads, config.kv_heads, config.head_dim, config.attention_scale, config.windows[layer]
        )

        def name(part: str) -> str:
            return layer_tensor(layer, part)

        bias = None
        if config.qkv_bias:
            bias = np.concatenate([self._vector(name(f"{part}_bias")) for part in "qkv"])
        norms = None
        if config.qk_norm:
            norms = (self._norm(name("q_norm")), self._norm(name("k_norm")), config.norm_eps)
        return _Layer(
            attn_norm=self._norm(name("attn_norm")),
            qkv=self._linear([name(part) for part in "qkv"], bias),
            o=self._linear([name("o")]),
            ffn_norm=self._norm(name("ffn_norm")),
            gate_up=self.backend.load_gated(
                self._checkpoint.read(name("gate")), self._checkpoint.read(name("up")), self._mode
            ),
            down=self._linear([name("down")]),
            qk_norms=norms,
            post_attn_norm=self._norm(name("post_attn_norm")) if config.post_norms else None,
            post_ffn_norm=self._norm(name("post_ffn_norm")) if config.post_norms else None,
            spec=spec,
            rope=rope,
        )

    def _linear(self, names: list[str], bias: NDArray[np.float32] | None = None) -> Linear:
        return self.backend.load_linear([self._checkpoint.read(name) for name in names], self._mode, bias)

    def _norm(self, name: str) -> Array:
        return self.backend.load_array(self._vector(name))

    def _vector(self, name: str) -> NDArray[np.float32]:
        values: Any = self._checkpoint.read(name)
        if isinstance(values, CodedWeight):
            raise ModelFileInvalid(f"tensor {name!r} is quantized, which a vector cannot be")
        return np.asarray(values, np.float32)

    def _ropes(self) -> tuple[RopeTable, RopeTable]:
        """The tables of global layers and of layers with a window."""
        config = self.config
        factors = self._vector(ROPE_FACTORS) if ROPE_FACTORS in self._checkpoint.tensors else None
        angles = rope_angles(config.rope_base, config.head_dim, self.context, config.rope_scaling, factors)
        whole = RopeTable(*map(self.backend.load_array, angles))
        if config.local_rope_base is None:
            return whole, whole
        angles = rope_angles(config.local_rope_base, config.head_dim, self.context)
        return whole, RopeTable(*map(self.backend.load_array, angles))


def _check_finite(logits: Logits, batch: StepBatch) -> None:
    bad = np.flatnonzero(np.logical_not(finite_rows(logits)))
    if len(bad):
        rows = batch.logit_rows[bad]
        sequences = np.searchsorted(batch.row_starts, rows, side="right") - 1
        where = ", ".join(
            f"{row} (sequence {sequence})" for row, sequence in zip(rows, sequences, strict=True)
        )
        raise NonFiniteActivations(f"NaN or infinity in the logits of row {where}", sequences.tolist())
