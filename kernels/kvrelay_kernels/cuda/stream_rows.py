"""Products of few rows with 16-bit weights on Hopper, at the speed of reading (`sources/stream_rows.cu`)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kvrelay_kernels.cuda.activation import gated
from kvrelay_kernels.cuda.coded_matrix import TILE_ROWS
from kvrelay_kernels.cuda.module import KernelCache, KernelKey
from kvrelay_kernels.cuda.tensor_map import ROW_BYTES, matrix_map
from kvrelay_kernels.interface import Activation
from kvrelay_kernels.quant.formats import Element

ARCHITECTURE = "sm_90a"
"""The only one that has the instructions."""
COLUMNS = (8, 16, 32, 64, 128)
"""Rows of x for which there are kernels."""
MOST_ROWS = COLUMNS[-1]
"""Of x in one launch."""
GROUP_ROWS = 64
"""Of the weight, that a warpgroup multiplies."""
MOST_TILE_ROWS = 128
UNIT_ROWS = 8
"""Tiles are multiples of so many rows, as the copy engine swizzles them; of gated weights, of `TILE_ROWS`."""
RING_BYTES = 184 << 10
"""Of shared memory; what is left serves the small kernels that run beside."""
PLACE_BYTES = 20 << 10
"""Of the ring that are filled, and multiplied, at once; about."""
CONTROL_BYTES = 1024


@dataclass(frozen=True)
class StreamShape:
    """How the work is spread. No choice here changes a bit of a result."""

    tile_rows: int
    """Of the weight: what a thread block works on at once."""
    columns: int
    """Rows of x, one of `COLUMNS`."""
    panels: int
    """Of 64 columns, that a place in the ring has."""
    ring_bytes: int = RING_BYTES

    @property
    def groups(self) -> int:
        """Warpgroups that multiply."""
        return -(-self.tile_rows // GROUP_ROWS)

    @property
    def threads(self) -> int:
        """Of a thread block: the warpgroups that multiply, and a warp that copies."""
        return 128 * self.groups + 32

    @property
    def stages(self) -> int:
        """Places in the ring."""
        return self.ring_bytes // self._stage_bytes

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a thread block; warpgroups read behind the rows of a tile."""
        behind = (GROUP_ROWS * self.groups - self.tile_rows) * ROW_BYTES
        return self.stages * self._stage_bytes + max(CONTROL_BYTES, behind)

    @property
    def _stage_bytes(self) -> int:
        return self.panels * (self.tile_rows + self.columns) * ROW_BYTES

    def key(
        self,
        element: Element,
        float_out: bool,
        arch: str = ARCHITECTURE,
        activation: Activation | None = None,
    ) -> KernelKey:
        """The kernel."""
        constants = {
            "TILE_ROWS": self.tile_rows,
            "PANELS": self.panels,
            "COLUMNS": self.columns,
            "STAGES": self.stages,
            "CONTROL_BYTES": CONTROL_BYTES,
            "BFLOAT": element == "bfloat16",
            "FLOAT_OUT": float_out,
            "GATED": gated(activation),
        }
        return KernelKey.of("stream_rows", constants, arch)

    def blocks(self, n: int, processors: int) -> int:
        """Thread blocks for `n` weight rows, each with the same number of tiles but for one."""
        tiles = -(-n // self.tile_rows)
        return -(-tiles // -(-tiles // processors))


def stream_shape(n: int, columns: int, processors: int, unit_rows: int = UNIT_ROWS) -> StreamShape:
    """The choice for `n` weight rows: each multiprocessor has its share, in as few tiles as may be."""
    share = -(-n // processors)
    tiles = -(-share // MOST_TILE_ROWS)
    tile_rows = -(-share // (tiles * unit_rows)) * unit_rows
    panels = max(1, PLACE_BYTES // ((tile_rows + columns) * ROW_BYTES))
    return StreamShape(tile_rows, columns, panels)


class StreamRows:
    """Products of x with 16-bit weights, on CuPy's current stream; neither allocates nor waits.

    A row's bits depend neither on the number of rows nor on the others.
    """

    def __init__(
        self,
        element: Element,
        kernels: KernelCache,
        processors: int,
        shape_of: Callable[[int, int, int, int], StreamShape] = stream_shape,
    ) -> None:
        """`processors` of the device share the work."""

        @cache
        def shape(n: int, columns: int, whole_tiles: bool) -> StreamShape:
            return shape_of(n, columns, processors, TILE_ROWS if whole_tiles else UNIT_ROWS)

        @cache
        def kernel(shape: StreamShape, float_out: bool, activation: Activation | None) -> Any:
            key = shape.key(element, float_out, activation=activation)
            return kernels.load(key, shape.shared_bytes)

        self._processors, self._shape, self._kernel = processors, shape, kernel

    def takes(self, weight: Any) -> bool:
        """Whether it multiplies with a weight, uint16 `[n, k]`: rows must be multiples of 16 bytes."""
        return weight.shape[1] % 8 == 0

    def __call__(
        self, x: Any, weight: Any, bias: Any, out: Any, activation: Activation | None = None
    ) -> None:
        """Write `x @ weight.T (+ bias)` to `out`.

        Args:
            x: `[rows, k]` uint16; more than `MOST_ROWS` rows read the weight anew for each so many.
            weight: one that it `takes`.
            bias: `[n]` uint16, or None.
            out: `[rows, n]`, uint16 for elements or float32.
            activation: of a gated weight (`gated_order`), on sums in float32; then out is `[rows, n / 2]`,
                `activation(gate) * up`.

        Raises:
            KernelError: the driver refused; the message holds its code.
        """
        for start in range(0, len(x), MOST_ROWS):
            end = start + MOST_ROWS
            self._launch(x[start:end], weight, bias, out[start:end], activation)

    def load(self, weight: Any, float_out: bool, rows: int, activation: Activation | None = None) -> None:
        """Have the kernels for 1 up to `rows` rows compiled."""
        for columns in COLUMNS:
            shape = self._shape(weight.shape[0], columns, activation is not None)
            self._kernel(shape, float_out, activation)
            if columns >= rows:
                return

    def _launch(self, x: Any, weight: Any, bias: Any, out: Any, activation: Activation | None) -> None:
        n, k = weight.shape
        columns = next(columns for columns in COLUMNS if columns >= len(x))
        shape = self._shape(n, columns, activation is not None)
        kernel = self._kernel(shape, out.dtype == np.float32, activation)
        args = (
            matrix_map(x, columns), matrix_map(weight, shape.tile_rows), 0 if bias is None else bias, out,
            *map(np.int32, (len(x), n, k)),
        )  # fmt: skip
        grid = (shape.blocks(n, self._processors),)
        kernel(grid, (shape.threads,), args, shared_mem=shape.shared_bytes)
