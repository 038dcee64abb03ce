"""Products of few rows with 16-bit weights on Hopper, at the speed of reading (`sources/stream_rows.cu`)."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kvrelay_kernels.cuda.module import KernelCache, KernelKey
from kvrelay_kernels.cuda.tensor_map import ROW_BYTES, matrix_map
from kvrelay_kernels.quant.formats import Element

ARCHITECTURE = "sm_90a"
"""The only one that has the instructions."""
PANEL_COLUMNS = ROW_BYTES // 2
COLUMNS = (8, 16, 32, 64, 128)
"""Rows of x for which there are kernels."""
MOST_ROWS = COLUMNS[-1]
"""Of x in one launch."""
CONTROL_BYTES = 512
MOST_TILES = 4096
PIECES = 2
"""Tiles that a thread block has in part, at most."""


@dataclass(frozen=True)
class StreamShape:
    """How the work is spread; `groups` and `blocks_per_sm` decide where sums are cut, so the last bits."""

    groups: int
    """Of 64 weight rows: what a thread block works on at once."""
    blocks_per_sm: int
    ring_bytes: int
    """Of shared memory, for a thread block."""

    @property
    def tile_rows(self) -> int:
        """Weight rows of a tile."""
        return 64 * self.groups

    @property
    def threads(self) -> int:
        """Of a thread block: the warpgroups that multiply, and a warp that copies."""
        return 128 * self.groups + 32

    def stages(self, columns: int) -> int:
        """Places in the ring for `columns` rows of x."""
        return self.ring_bytes // self._stage_bytes(columns)

    def shared_bytes(self, columns: int) -> int:
        """Dynamic shared memory of a thread block."""
        return self.stages(columns) * self._stage_bytes(columns) + CONTROL_BYTES

    def _stage_bytes(self, columns: int) -> int:
        return (self.tile_rows + columns) * ROW_BYTES

    def key(self, columns: int, element: Element, float_out: bool, arch: str = ARCHITECTURE) -> KernelKey:
        """The kernel for up to `columns` rows of x."""
        constants = {
            "GROUPS": self.groups,
            "COLUMNS": columns,
            "STAGES": self.stages(columns),
            "CONTROL_BYTES": CONTROL_BYTES,
            "BFLOAT": element == "bfloat16",
            "FLOAT_OUT": float_out,
        }
        return KernelKey.of("stream_rows", constants, arch)

    def tiles(self, n: int) -> int:
        """Tiles of a weight of `n` rows."""
        return -(-n // self.tile_rows)

    def blocks(self, n: int, k: int, processors: int) -> int:
        """Thread blocks for a weight, at least a unit each."""
        return min(processors * self.blocks_per_sm, self.tiles(n) * -(-k // PANEL_COLUMNS))


SHAPE = StreamShape(groups=2, blocks_per_sm=1, ring_bytes=184 << 10)


class StreamRows:
    """Products of x with 16-bit weights, on CuPy's current stream; neither allocates nor waits.

    A row's bits depend neither on the number of rows nor on the others. One instance's calls follow each
    other.
    """

    def __init__(
        self,
        element: Element,
        kernels: KernelCache,
        processors: int,
        arrays: Any,
        shape: StreamShape = SHAPE,
    ) -> None:
        """`processors` of the device share the work; `arrays`: the library, CuPy, or NumPy in tests."""
        self._processors, self._shape = processors, shape
        most_blocks = processors * shape.blocks_per_sm
        self._pieces = arrays.empty((PIECES * most_blocks, shape.tile_rows, MOST_ROWS), np.float32)
        self._arrivals = arrays.zeros(MOST_TILES, np.uint32)

        @cache
        def kernel(float_out: bool, columns: int) -> Any:
            return kernels.load(shape.key(columns, element, float_out), shape.shared_bytes(columns))

        self._kernel = kernel

    def takes(self, weight: Any) -> bool:
        """Whether it multiplies with a weight, uint16 `[n, k]`: rows must be multiples of 16 bytes."""
        n, k = weight.shape
        return k % 8 == 0 and self._shape.tiles(n) <= MOST_TILES

    def __call__(self, x: Any, weight: Any, bias: Any, out: Any) -> None:
        """Write `x @ weight.T (+ bias)` to `out`.

        Args:
            x: `[rows, k]` uint16; more than `MOST_ROWS` rows read the weight anew for each so many.
            weight: one that it `takes`.
            bias: `[n]` uint16, or None.
            out: `[rows, n]`, uint16 for elements or float32.

        Raises:
            KernelError: the driver refused; the message holds its code.
        """
        for start in range(0, len(x), MOST_ROWS):
            self._launch(x[start : start + MOST_ROWS], weight, bias, out[start : start + MOST_ROWS])

    def load(self, float_out: bool, rows: int) -> None:
        """Have the kernels for 1 up to `rows` rows compiled."""
        for columns in COLUMNS:
            self._kernel(float_out, columns)
            if columns >= rows:
                return

    def _launch(self, x: Any, weight: Any, bias: Any, out: Any) -> None:
        n, k = weight.shape
        columns = next(columns for columns in COLUMNS if columns >= len(x))
        shape = self._shape
        args = (
            matrix_map(x, columns), matrix_map(weight, shape.tile_rows), 0 if bias is None else bias, out,
            self._pieces, self._arrivals, *map(np.int32, (len(x), n, k)),
        )  # fmt: skip
        kernel = self._kernel(out.dtype == np.float32, columns)
        grid = (shape.blocks(n, k, self._processors),)
        kernel(grid, (shape.threads,), args, shared_mem=shape.shared_bytes(columns))
