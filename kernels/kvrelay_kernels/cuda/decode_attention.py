"""Launcher of the split-K decode attention kernel (`sources/decode_attention.cu`)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, Literal

import numpy as np

from kvrelay_kernels.cuda.device import shared_memory_limit
from kvrelay_kernels.cuda.format_constants import format_constants
from kvrelay_kernels.cuda.module import KernelCache, KernelKey, device_arch
from kvrelay_kernels.cuda.tensor_map import ROW_BYTES, tensor_map
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import AttentionSpec
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout

HEAD_DIMS = (64, 96, 128, 256)
MAX_ROWS = 32
RESERVED_BYTES = 1024
"""Shared memory of a thread block that kernels leave to the system."""
SHARED_BYTES = 227 * 1024 - RESERVED_BYTES
"""Dynamic shared memory a thread block can have on compute capabilities 9.0 and 10.0."""

BOX_BYTES = 1024
"""Codes of a tile begin at multiples of this in shared memory: the copy engine's swizzle repeats there."""
_WIDENED = {6: 8, 3: 4}
"""Bits of codes that straddle words, and what they are widened to before they are loaded."""

RAISED_GROUP = 16
"""Elements that share a scale where scales are made halves in shared memory."""
TABLED = "turbo4"
"""Whose codes are looked up in shared memory, two at a time, by each lane in a table of its own."""
TABLE_BYTES = 32 * 256 * 4

ABSENT = 0xFFFFFFFF
"""A word of a partial result that is not there (`sources/primitives.cuh`)."""

LOG2_E = 1.4426950408889634

Element16 = Literal["float16", "bfloat16"]


@dataclass(frozen=True)
class LaunchShape:
    """How the work is spread: chosen by measurement (docs/kernels.md)."""

    warps: int = 8
    stages: int = 2
    """Tiles a warp holds in shared memory: one in work, the others on their way."""
    tile: int = 32
    """Tokens of one step of a warp."""
    blocks_per_sm: int = 1
    """Thread blocks wanted on a multiprocessor; fewer run where shared memory or registers are short."""
    begin_cost: int = 6
    """What beginning a KV head costs a thread block, in blocks of 64 tokens."""
    side: int = 1
    """KV heads that a thread block reads side by side, as they lie in a block; divides these and `warps`."""


@dataclass(frozen=True)
class DecodeProblem:
    """What a kernel is compiled for."""

    layout: BlockLayout
    spec: AttentionSpec
    element: Element16
    """Type of queries and output, and of an uncoded cache."""
    rows: int = 1
    """Query rows of each sequence: its last tokens."""

    def __post_init__(self) -> None:
        fmt, spec = self.layout.format, self.spec
        if self.layout.head_dim not in HEAD_DIMS:
            raise FormatUnsupported(
                f"decode attention runs head dimensions {HEAD_DIMS}, not {self.layout.head_dim}"
            )
        if not fmt.quantized and fmt.element != self.element:
            raise FormatUnsupported(f"a cache of {fmt.element} does not go with {self.element} queries")
        if (spec.kv_heads, spec.head_dim) != (self.layout.kv_heads, self.layout.head_dim):
            raise FormatUnsupported(f"{spec} does not fit {self.layout}")
        if not 1 <= self.rows <= MAX_ROWS:
            raise FormatUnsupported(f"decode attention takes 1 to {MAX_ROWS} query rows, not {self.rows}")

    @property
    def queries(self) -> int:
        """Queries that share a KV head."""
        return self.rows * self.spec.heads // self.spec.kv_heads

    @property
    def query_tile(self) -> int:
        """Queries a thread block works on at once: one or two columns of the matrix instruction."""
        return 16 if self.queries > 8 and self.spec.head_dim <= 128 else 8

    @property
    def query_tiles(self) -> int:
        """Passes over a KV head's blocks."""
        return -(-self.queries // self.query_tile)

    def constants(self, shape: LaunchShape) -> dict[str, int]:
        """Macros of the kernel's source."""
        spec = self.spec
        return format_constants(self.layout) | {
            "HEADS_PER_KV": spec.heads // spec.kv_heads,
            "ROWS": self.rows,
            "QUERY_TILE": self.query_tile,
            "BFLOAT": int(self.element == "bfloat16"),
            "WARPS": shape.warps,
            "SIDE": shape.side,
            "STAGES": shape.stages,
            "TILE": shape.tile,
            "BLOCKS_PER_SM": shape.blocks_per_sm,
        }

    def key(self, shape: LaunchShape, arch: str) -> KernelKey:
        """What the kernel is compiled from."""
        return KernelKey.of("decode_attention", self.constants(shape), arch)

    def box_rows(self, shape: LaunchShape) -> int:
        """Rows of `ROW_BYTES` that the copy engine fetches at once: a tile of one KV head's codes."""
        return shape.tile * self.spec.head_dim * self._bits // 8 // ROW_BYTES

    def shared_bytes(self, shape: LaunchShape) -> int:
        """Dynamic shared memory of a thread block; mirrors `decode_shape.cuh`."""
        dim, bits, frames = self.spec.head_dim, self._bits, self.layout.frames
        scales = sum(frame.nbytes for frame in frames if not frame.name.endswith(("codes", "values")))
        scales = scales // (self.spec.kv_heads * BLOCK_TOKENS)

        def two_sides(width: int) -> int:
            return 2 * -(-shape.tile * dim * width // 8 // BOX_BYTES) * BOX_BYTES

        ring = shape.stages * (two_sides(bits) + shape.tile * scales + 8)
        widened = two_sides(_WIDENED[bits]) if bits in _WIDENED else 0
        if self.layout.format.group == RAISED_GROUP:
            widened += -(-shape.tile * dim // 4 // BOX_BYTES) * BOX_BYTES
        area = min(self.queries, self.query_tile) * (dim + 4) * 4
        total = shape.warps * (ring + widened + area + 2 * self.query_tile * 4) + 8
        if self.layout.format.base != TABLED:
            return total
        return -(-total // 128) * 128 + TABLE_BYTES

    @property
    def _bits(self) -> int:
        return self.layout.format.code_bits or 16


class DecodeLaunch:
    """The kernels of one problem and the memory they work in, wherever that lies.

    `plan` comes before the instance is called, once for all layers of a step. Neither allocates or waits.
    """

    def __init__(
        self,
        problem: DecodeProblem,
        shape: LaunchShape,
        sequences: int,
        blocks: int,
        arch: str,
        kernels: KernelCache,
        arrays: Any,
    ) -> None:
        """`blocks` thread blocks share the work; `arrays` is the array library: CuPy, or NumPy in tests.

        Thread blocks wait for what others hand over, so that no more may be asked for than run at once.
        """
        self.problem, self.shape, self.sequences, self.blocks = problem, shape, sequences, blocks
        self._shared = problem.shared_bytes(shape)
        self._plan_kernel = kernels.load(KernelKey.of("decode_plan", {}, arch), 4 * (sequences + 1))
        self._kernel = kernels.load(problem.key(shape, arch), self._shared)
        self._heads = problem.spec.kv_heads // shape.side * problem.query_tiles
        pairs = shape.side * min(problem.queries, problem.query_tile) * problem.spec.head_dim // 2
        self._partials = arrays.full((blocks, 2, pairs, 4), ABSENT, np.uint32)
        pieces = blocks + sequences * self._heads
        self._plan = arrays.zeros(4 + 8 * pieces + sequences, np.int32)
        self._planned = 0
        self._plan_ahead = True

    def plan(self, lengths: Any) -> None:
        """See `DecodeAttention.plan`."""
        if lengths.shape[0] > self.sequences:
            raise ValueError(f"{lengths.shape[0]} sequences do not fit a workspace for {self.sequences}")
        self._planned, self._plan_ahead = lengths.shape[0], True
        args = (
            lengths, *map(np.int32, (
                self._planned, self.problem.rows, self.problem.spec.window or 0, self._heads, self.blocks,
                self.shape.begin_cost,
            )), self._plan,
        )  # fmt: skip
        self._plan_kernel((1,), (512,), args, shared_mem=4 * (self._planned + 1))

    def __call__(self, q: Any, cache: int, box_map: Any, layer_bytes: int, tables: Any, out: Any) -> None:
        """Attention over a layer that begins `layer_bytes` behind the address `cache`, as planned.

        `box_map` describes the cache to the copy engine (`box_rows`); `q`, `tables` and `out` are those of
        `DecodeAttention`.
        """
        args = (
            q, box_map, cache + layer_bytes, np.int32(layer_bytes // ROW_BYTES),
            tables, self._plan, out, self._partials,
            np.int32(tables.strides[0] // 4), np.int32(self._planned),
            np.float32(self.problem.spec.scale * LOG2_E), np.int32(self.problem.spec.window or 0),
            np.int32(self._plan_ahead),
        )  # fmt: skip
        self._plan_ahead = False
        self._kernel((self.blocks,), (32 * self.shape.warps,), args, shared_mem=self._shared)


class DecodeAttention:
    """Attention of a few query rows a sequence over a paged cache; owns the workspace of one problem.

    `attach` comes first; then a step calls `plan` once and the instance for each layer. The workspace is
    sized for `sequences`; neither call allocates or waits, so both can be captured in a graph.
    """

    def __init__(
        self,
        problem: DecodeProblem,
        sequences: int,
        kernels: KernelCache,
        shape: LaunchShape | None = None,
    ) -> None:
        import cupy  # pyright: ignore[reportMissingImports]
        from cupy.cuda import driver  # pyright: ignore[reportMissingImports]

        self.problem, self.sequences = problem, sequences
        self.shape = shape = shape or launch_shape(
            problem, shared_memory_limit() - RESERVED_BYTES, sequences=sequences
        )
        arch, shared = device_arch(), problem.shared_bytes(shape)
        kernel = kernels.load(problem.key(shape, arch), shared)
        fitting = driver.occupancyMaxActiveBlocksPerMultiprocessor(kernel.ptr, 32 * shape.warps, shared)
        if fitting == 0:
            raise FormatUnsupported(f"{shape} needs {shared} bytes of shared memory")
        processors = cupy.cuda.Device().attributes["MultiProcessorCount"]
        self.blocks = processors * min(fitting, shape.blocks_per_sm)
        self._launch = DecodeLaunch(problem, shape, sequences, self.blocks, arch, kernels, cupy)
        self._arena: Any = None
        self._map: Any = None

    def attach(self, arena: Any) -> None:
        """Take `arena`, `[layers, blocks, block_bytes]` uint8 and contiguous, as the cache to read."""
        layout = self.problem.layout
        if arena.ndim != 3 or arena.shape[2] != layout.block_bytes:
            raise ValueError(
                f"an arena of {layout} is [layers, blocks, {layout.block_bytes}], not {arena.shape}"
            )
        self._map = tensor_map(arena.data.ptr, arena.nbytes, self.problem.box_rows(self.shape))
        self._arena = arena

    def plan(self, lengths: Any) -> None:
        """Divide the work of a step's batch, on CuPy's current stream.

        Args:
            lengths: `[sequences]` int32 on the device, the query rows included; 0 for a slot that is free,
                whose output is zero.
        """
        self._launch.plan(lengths)

    def __call__(self, q: Any, layer: int, tables: Any, out: Any) -> None:
        """Write attention of `q` over a layer of the arena to `out`, on CuPy's current stream, as planned.

        Args:
            q: `[sequences * rows, heads, head_dim]`, contiguous, 16-bit; row r of a sequence is its token
                `lengths - rows + r`.
            layer: whose keys and values to read.
            tables: `[sequences, n]` int32, arena blocks in order; entries past a length are not read.
            out: as `q`; where the format rotates values, the result as it is rotated with them.
        """
        layer_bytes = layer * self._arena.shape[1] * self._arena.shape[2]
        self._launch(q, self._arena.data.ptr, self._map, layer_bytes, tables, out)


Shape = tuple[int, int, int]
"""Warps, stages, tile."""

# (bits of an element, head dimension) -> shape. Measured on an H200 (docs/kernels.md) at head dimension 128,
# and in int8 at 64 and 256; a guess for all others.
_SHAPES: Mapping[tuple[int, int], Shape] = {
    (16, 64): (8, 2, 32),
    (16, 128): (8, 3, 16),
    (16, 256): (4, 2, 16),
    (8, 64): (8, 2, 64),
    (8, 128): (8, 2, 32),
    (8, 256): (8, 2, 16),
    (6, 64): (8, 2, 32),
    (6, 128): (8, 2, 32),
    (6, 256): (6, 2, 16),
    (4, 64): (16, 2, 64),
    (4, 128): (12, 2, 32),
    (4, 256): (8, 2, 32),
    (3, 256): (8, 2, 32),
}
_OWN_SHAPES: Mapping[tuple[str, int], Shape] = {
    ("nvfp4", 64): (12, 2, 64),
    ("nvfp4", 128): (16, 2, 32),
    ("turbo4", 128): (16, 2, 32),
}
"""Of formats that differ from others of as many bits."""
_SIDE, MANY_HEADS = {(16, 128): 4}, 64
"""KV heads side by side, where that is faster, and for how many of a batch: few have too many pieces. Fewer
side by side where the numbers of heads or of warps want it."""
_BEGIN_COST = {16: 4, 8: 6, 6: 8, 4: 16, 3: 14}
"""At head dimension 128."""


def launch_shape(
    problem: DecodeProblem,
    shared_limit: int = SHARED_BYTES,
    shapes: Mapping[tuple[int, int], Shape] = _SHAPES,
    sequences: int = 1,
) -> LaunchShape:
    """The choice for a problem, with as many warps as fit into `shared_limit` bytes and into registers.

    `shapes` go before those of split-K; `sequences` of a batch share the device.

    Raises:
        FormatUnsupported: not even one fits.
    """
    fmt, dim = problem.layout.format, problem.spec.head_dim
    bits = fmt.code_bits or 16
    found = _OWN_SHAPES.get((fmt.base, dim)) or shapes.get((bits, dim)) or _SHAPES.get((bits, dim))
    warps, stages, tile = found or (8, 2, 64 if bits <= 4 else 32)
    if problem.query_tile == 16:
        warps = min(warps, 8)
    begin_cost = _BEGIN_COST[bits] * max(1, 128 // dim)
    shape = LaunchShape(warps, stages, tile, begin_cost=begin_cost)
    while problem.shared_bytes(shape) > shared_limit:
        if shape.warps == 1:
            raise FormatUnsupported(
                f"decode attention on {problem.layout.format.name}, head dimension {problem.spec.head_dim},"
                f" needs {problem.shared_bytes(shape)} bytes of shared memory; the GPU has {shared_limit}"
            )
        shape = replace(shape, warps=shape.warps - 1)
    many = sequences * problem.spec.kv_heads * problem.query_tiles >= MANY_HEADS
    side = _SIDE.get((bits, dim), 1) if many else 1
    return replace(shape, side=gcd(side, shape.warps, problem.spec.kv_heads))
