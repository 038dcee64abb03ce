"""cuDNN's attention over paged 16-bit blocks, through cudnn-frontend: a plan for each bucket of lengths.

Lengths, tables and row offsets come in as device arrays, so that a plan serves every step that fits its
buckets; plans are kept serialized. Source of the graph's form: cudnn-frontend's documentation of SDPA.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.survey import cudnn_fault, numbers, spoken
from kvrelay_kernels.errors import BackendUnavailable, FormatUnsupported
from kvrelay_kernels.interface import AttentionSpec, StepBatch
from kvrelay_kernels.plans import DeviceClass, GraphKey, MaskKey, PlanCache, PlanCounts, PlanStore, TensorKey
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout

PLANS = 64
"""Kept in memory."""
FEWEST_ROWS = 128
FEWEST_KEYS = 256

# Numbers of the graph's tensors.
_Q, _K, _V, _OUT, _ROWS, _KEYS, _TABLES, _OFFSETS = range(1, 9)


def bucket(count: int, fewest: int = 1) -> int:
    """The power of two, from `fewest` on, that holds `count`."""
    return max(fewest, 1 << (count - 1).bit_length())


@dataclass(frozen=True)
class CudnnStep:
    """A step's prompts, padded to buckets; int32 arrays on the host."""

    rows: NDArray[np.int32]
    """`[sequences]`: query rows of each; 0 for those that pad."""
    keys: NDArray[np.int32]
    """`[sequences]`"""
    offsets: NDArray[np.int32]
    """`[sequences + 1]`: elements before each one's first row."""
    tables: NDArray[np.int32]
    """`[sequences, blocks]`"""
    most_rows: int
    """Bucket of the rows of one sequence."""

    @property
    def most_keys(self) -> int:
        """Bucket of the keys of one sequence."""
        return self.tables.shape[1] * BLOCK_TOKENS

    @property
    def arrays(self) -> Sequence[NDArray[np.int32]]:
        """What the device needs."""
        return self.rows, self.keys, self.offsets, self.tables


def pad_step(batch: StepBatch, tables: NDArray[np.int32], width: int) -> CudnnStep:
    """The prompts of `batch`, whose blocks `tables` names; a row of queries has `width` elements."""
    prompts = batch.prompt_numbers
    counts, lengths = np.diff(batch.row_starts)[prompts], batch.lengths[prompts]
    sequences = bucket(len(prompts))
    rows, keys = np.zeros(sequences, np.int32), np.zeros(sequences, np.int32)
    rows[: len(prompts)], keys[: len(prompts)] = counts, lengths
    offsets = np.full(sequences + 1, batch.rows, np.int32)
    offsets[: len(prompts)] = batch.row_starts[prompts]
    blocks = bucket(int(lengths.max()), FEWEST_KEYS) // BLOCK_TOKENS
    padded = np.zeros((sequences, blocks), np.int32)
    shared = min(blocks, tables.shape[1])
    padded[: len(prompts), :shared] = tables[prompts, :shared]
    return CudnnStep(rows, keys, offsets * np.int32(width), padded, bucket(int(counts.max()), FEWEST_ROWS))


@dataclass(frozen=True)
class CudnnProblem:
    """What a plan is built for."""

    spec: AttentionSpec
    layout: BlockLayout
    """Of the blocks that are read; unquantized."""
    blocks: int
    """That there are."""
    sequences: int
    most_rows: int
    most_keys: int

    @property
    def ragged(self) -> bool:
        """Whether sequences bring different numbers of rows: single rows lie one behind the other."""
        return self.most_rows > 1

    @property
    def masked(self) -> bool:
        """Whether a row does not see all keys of its sequence; a single one does, but for a window."""
        return self.ragged or self.spec.window is not None

    @property
    def tensors(self) -> dict[int, TensorKey]:
        """Dims and strides of everything that goes in and out, by number."""
        spec, layout, n = self.spec, self.layout, self.sequences
        row = spec.heads * spec.head_dim
        element = layout.format.element
        queries = (n, spec.heads, self.most_rows, spec.head_dim)
        query_strides = (self.most_rows * row, spec.head_dim, row, 1)
        cache = (self.blocks, spec.kv_heads, BLOCK_TOKENS, spec.head_dim)
        cache_strides = (layout.block_bytes // 2, BLOCK_TOKENS * spec.head_dim, spec.head_dim, 1)
        width = self.most_keys // BLOCK_TOKENS
        ones = (1, 1, 1, 1)
        offsets = {_OFFSETS: TensorKey("offsets", "int32", (n + 1, 1, 1, 1), ones)} if self.ragged else {}
        return {
            _Q: TensorKey("q", element, queries, query_strides),
            _K: TensorKey("k", element, cache, cache_strides),
            _V: TensorKey("v", element, cache, cache_strides),
            _OUT: TensorKey("out", element, queries, query_strides),
            _ROWS: TensorKey("rows", "int32", (n, 1, 1, 1), ones),
            _KEYS: TensorKey("keys", "int32", (n, 1, 1, 1), ones),
            _TABLES: TensorKey("tables", "int32", (n, 1, width, 1), (width, width, 1, 1)),
        } | offsets

    def graph_key(self, device: DeviceClass, libraries: dict[str, str]) -> GraphKey:
        """Everything that decides the plan."""
        mask = MaskKey("bottom_right" if self.masked else "none", self.spec.window, padding=True)
        return GraphKey.of(
            "cudnn.sdpa",
            device,
            tensors=tuple(self.tensors.values()),
            mask=mask,
            attributes={"scale": float(self.spec.scale), "paged": True},
            libraries=libraries,
        )


class CudnnAttention:
    """Causal attention, with or without a window, of prompts of any lengths in one call."""

    def __init__(self, plans: PlanStore, device: DeviceClass) -> None:
        """Raises BackendUnavailable where cudnn-frontend or cuDNN is missing or too old."""
        try:
            import cudnn  # pyright: ignore[reportMissingImports]

            self._handle: Any = cudnn.create_handle()
        except (ImportError, OSError, RuntimeError) as error:
            raise BackendUnavailable(
                f"cuDNN is missing ({error}): pip install 'kvrelay[cuda13]' or 'kvrelay[cuda12]'"
            ) from error
        fault = cudnn_fault(spoken(cudnn.backend_version()), numbers(cudnn.__version__))
        if fault is not None:
            raise BackendUnavailable(fault)
        self._cudnn = cudnn
        self._device = device
        self._libraries = {"cudnn": str(cudnn.backend_version()), "cudnn-frontend": cudnn.__version__}
        self._plans: PlanCache[Any] = PlanCache(plans, PLANS)
        self._workspace: Any = None
        self._outgrown: list[Any] = []
        """Smaller workspaces, which recorded steps go on working in."""

    @property
    def plan_counts(self) -> PlanCounts:
        """How plans were come by since the start."""
        return self._plans.counts

    def __call__(
        self, problem: CudnnProblem, q: Any, out: Any, keys: int, values: int, step: Sequence[Any]
    ) -> None:
        """Write the prompts' rows of `out`, on CuPy's current stream.

        Args:
            problem: what the step fits.
            q: `[rows, heads, head_dim]`, contiguous, 16-bit.
            out: as `q`.
            keys: address of the first block's keys.
            values: address of its values.
            step: the arrays of a `CudnnStep`, on the device; None for the offsets where rows are single.

        Raises:
            FormatUnsupported: cuDNN has no kernel for it here.
        """
        import cupy  # pyright: ignore[reportMissingImports]

        plan = self._plans.get(
            problem.graph_key(self._device, self._libraries),
            lambda: self._build(problem),
            lambda graph: bytes(graph.serialize(as_bytes=True)),
            self._load,
        )
        graph = plan.value
        size = max(1, graph.get_workspace_size())
        if self._workspace is None or self._workspace.size < size:
            self._outgrown.append(self._workspace)
            self._workspace = cupy.empty(size, np.uint8)
        self._cudnn.set_stream(stream=cupy.cuda.get_current_stream().ptr, handle=self._handle)
        addresses = {_Q: q.data.ptr, _K: keys, _V: values, _OUT: out.data.ptr}
        for number, array in zip((_ROWS, _KEYS, _OFFSETS, _TABLES), step, strict=True):
            if array is not None:
                addresses[number] = array.data.ptr
        graph.execute(addresses, self._workspace.data.ptr, handle=self._handle)

    def _load(self, stored: bytes) -> Any:
        graph = self._cudnn.pygraph(handle=self._handle)
        graph.deserialize(self._handle, stored)
        return graph

    def _build(self, problem: CudnnProblem) -> Any:
        cudnn, spec = self._cudnn, problem.spec
        element = (
            cudnn.data_type.BFLOAT16 if problem.layout.format.element == "bfloat16" else cudnn.data_type.HALF
        )
        kinds = {"int32": cudnn.data_type.INT32, problem.layout.format.element: element}
        graph = cudnn.pygraph(
            io_data_type=element,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=self._handle,
        )
        keys = problem.tensors
        tensors = {
            number: graph.tensor(
                name=key.role,
                dim=list(key.dims),
                stride=list(key.strides),
                data_type=kinds[key.element],
                uid=number,
            )
            for number, key in keys.items()
            if number != _OUT
        }
        if problem.ragged:
            tensors[_Q].set_ragged_offset(tensors[_OFFSETS])
        mask: dict[str, Any] = {}
        if problem.masked:
            mask = {
                "diagonal_alignment": cudnn.diagonal_alignment.BOTTOM_RIGHT,
                "diagonal_band_right_bound": 0,
            }
        if spec.window is not None:
            mask["diagonal_band_left_bound"] = spec.window
        try:
            out, _ = graph.sdpa(
                name="attention",
                q=tensors[_Q],
                k=tensors[_K],
                v=tensors[_V],
                attn_scale=spec.scale,
                generate_stats=False,
                use_padding_mask=True,
                seq_len_q=tensors[_ROWS],
                seq_len_kv=tensors[_KEYS],
                paged_attention_k_table=tensors[_TABLES],
                paged_attention_v_table=tensors[_TABLES],
                paged_attention_max_seq_len_kv=problem.most_keys,
                **mask,
            )
            out.set_output(True).set_uid(_OUT).set_data_type(element)
            out.set_dim(list(keys[_OUT].dims)).set_stride(list(keys[_OUT].strides))
            if problem.ragged:
                out.set_ragged_offset(tensors[_OFFSETS])
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A])
            graph.check_support()
            graph.build_plans()
        except cudnn.cudnnGraphNotSupportedError as error:
            raise FormatUnsupported(f"cuDNN has no attention kernel for {problem}: {error}") from error
        return graph
