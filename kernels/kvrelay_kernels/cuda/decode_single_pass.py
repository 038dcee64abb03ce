"""Launcher of the single-pass decode attention kernel (`sources/decode_single_pass.cu`)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kvrelay_kernels.cuda.clusters import PORTABLE, Rooms, allow_large, find_rooms, largest_cluster
from kvrelay_kernels.cuda.decode_attention import (
    LOG2_E,
    RESERVED_BYTES,
    SHARED_BYTES,
    DecodeProblem,
    LaunchShape,
    Shape,
    launch_shape,
)
from kvrelay_kernels.cuda.device import shared_memory_limit
from kvrelay_kernels.cuda.module import KernelCache, KernelKey, device_arch
from kvrelay_kernels.cuda.tensor_map import ROW_BYTES, tensor_map
from kvrelay_kernels.errors import FormatUnsupported

_SHAPES: Mapping[tuple[int, int], Shape] = {(16, 128): (8, 2, 16), (8, 128): (8, 2, 32), (4, 128): (8, 2, 64)}
"""As those of split-K, and before them: fewer warps meet sooner."""
_MOST_INBOX_BYTES = 12 * 1024
CLUSTERS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)
"""Thread blocks that may share a head."""
_PLAN_THREADS = 512


class SinglePassLaunch:
    """The kernel of one problem, wherever memory lies: a cluster of thread blocks for each KV head.

    The results are those of `DecodeLaunch` up to the order of sums, in every format that it reads; a row's
    bits depend on its own sequence alone.
    """

    def __init__(
        self, problem: DecodeProblem, shape: LaunchShape, cluster: int, arch: str, kernels: KernelCache
    ) -> None:
        """Raises FormatUnsupported where thread blocks cannot run in clusters of this size."""
        if not 1 <= cluster <= largest_cluster(arch):
            raise FormatUnsupported(
                f"{arch} runs clusters of 1 to {largest_cluster(arch)} thread blocks, not {cluster}"
            )
        self.problem, self.shape, self.cluster = problem, shape, cluster
        self._shared = problem.shared_bytes(shape) + (_inbox_bytes(problem, cluster) if cluster > 1 else 0)
        self.kernel = kernels.load(single_pass_key(problem, shape, cluster, arch), self._shared)
        self._lengths: Any = None

    def plan(self, lengths: Any) -> None:
        """Take `lengths` for the calls that follow; they are read when the kernel runs."""
        self._lengths = lengths

    def __call__(self, q: Any, cache: int, box_map: Any, layer_bytes: int, tables: Any, out: Any) -> None:
        """See `DecodeLaunch`."""
        args = (
            q, box_map, cache + layer_bytes, np.int32(layer_bytes // ROW_BYTES), tables, self._lengths, out,
            np.int32(tables.strides[0] // 4), np.float32(self.problem.spec.scale * LOG2_E),
            np.int32(self.problem.spec.window or 0),
        )  # fmt: skip
        columns = self.problem.spec.kv_heads * self.problem.query_tiles * self.cluster
        grid = columns, self._lengths.shape[0]
        self.kernel(grid, (32 * self.shape.warps,), args, shared_mem=self._shared)


def _inbox_bytes(problem: DecodeProblem, cluster: int) -> int:
    """Shared memory for what comes from the other thread blocks of a cluster; mirrors the kernel's source."""
    queries = min(problem.queries, problem.query_tile)
    pairs = -(-queries * problem.spec.head_dim // 2 // cluster) + queries
    return 128 + 8 * cluster * pairs + 8


class SinglePass:
    """Takes the place of a `DecodeAttention`; needs no workspace, and so no number of sequences."""

    def __init__(
        self, problem: DecodeProblem, kernels: KernelCache, cluster: int = 1, shape: LaunchShape | None = None
    ) -> None:
        """Raises FormatUnsupported where the device cannot run it."""
        self.problem = problem
        self.shape = shape = shape or single_pass_shape(problem, shared_memory_limit() - RESERVED_BYTES)
        self._launch = SinglePassLaunch(problem, shape, cluster, device_arch(), kernels)
        if cluster > PORTABLE:
            allow_large(self._launch.kernel)
        self._arena: Any = None
        self._map: Any = None

    def attach(self, arena: Any) -> None:
        """See `DecodeAttention.attach`."""
        self._map = tensor_map(arena.data.ptr, arena.nbytes, self.problem.box_rows(self.shape))
        self._arena = arena

    def plan(self, lengths: Any) -> None:
        """Take `lengths`, `[sequences]` int32 on the device, for the calls that follow; runs nothing."""
        self._launch.plan(lengths)

    def __call__(self, q: Any, layer: int, tables: Any, out: Any) -> None:
        """See `DecodeAttention.__call__`."""
        layer_bytes = layer * self._arena.shape[1] * self._arena.shape[2]
        self._launch(q, self._arena.data.ptr, self._map, layer_bytes, tables, out)


def single_pass_shape(problem: DecodeProblem, shared_limit: int = SHARED_BYTES) -> LaunchShape:
    """As `launch_shape`. Raises FormatUnsupported."""
    return launch_shape(problem, shared_limit - _MOST_INBOX_BYTES, _SHAPES)


def single_pass_key(problem: DecodeProblem, shape: LaunchShape, cluster: int, arch: str) -> KernelKey:
    """What the kernel is compiled from."""
    return KernelKey.of("decode_single_pass", {**problem.constants(shape), "CLUSTER": cluster}, arch)


def device_rooms(kernels: KernelCache) -> Rooms:
    """How many clusters of `CLUSTERS` run at once here, each block on its own multiprocessor."""
    arch, shared = device_arch(), shared_memory_limit()
    sizes = [size for size in CLUSTERS if size <= largest_cluster(arch)]
    if not sizes:
        return {}
    # Any kernel will do that is there anyway: what is asked for is all of the shared memory.
    return find_rooms(
        kernels.load(KernelKey.of("decode_plan", {}, arch), shared), _PLAN_THREADS, shared, sizes
    )
