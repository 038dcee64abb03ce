"""Products of few rows with codes on Hopper, at the speed of reading (`sources/stream_codes.cu`)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kvrelay_kernels.cuda.activation import gated
from kvrelay_kernels.cuda.clusters import PORTABLE, Rooms, find_rooms
from kvrelay_kernels.cuda.coded_matrix import TILE_ROWS, UNIT_COLUMNS, CodedMatrix, Form
from kvrelay_kernels.cuda.halve_rows import HalveRows, HalvesShape
from kvrelay_kernels.cuda.module import KernelCache, KernelKey
from kvrelay_kernels.cuda.stream_rows import ARCHITECTURE
from kvrelay_kernels.cuda.tensor_map import planes_map
from kvrelay_kernels.interface import Activation
from kvrelay_kernels.quant.formats import Element

MOST_ROWS = 64
"""Of x in one launch."""
COLUMNS = (8, 16, 32, 64)
"""To which rows of x are padded."""
TILES = range(2, 17, 2)
"""Of 16 weight rows in a band: each has a warp, and warps come in groups of four."""
ROW_WARPS = {8: 8, 16: 0, 32: 0, 64: 0}
"""That bring x, by its rows; 0: the warp that brings the weight does, as `HalveRows` prepared it."""
ROW_DEPTH = 3
"""Times 8 rows of 64 columns that each of them has asked for ahead."""
STAGE_UNITS = {8: 16, 16: 16, 32: 4, 64: 4}
"""Of 64 columns in a stage, at most, by the rows of x."""
SHARED_BYTES = 190 << 10
"""Small kernels find room beside it."""
USUAL_WARPS = 10
"""With fewer that have a tile, a thread block does not keep up with memory."""
ENOUGH_STAGES = 3
STAGE = 0.5
"""What a stage costs beside its units, in units of each group of warps."""
GROUPS_MEET, BLOCKS_MEET = 20, 40
"""What it costs groups of warps, or thread blocks, to add up their sums, in units of a tile."""


@dataclass(frozen=True)
class Cut:
    """How a matrix is cut; it decides the order of sums, so it must not depend on x."""

    tiles: int
    """Of 16 rows in a band, one of `TILES`."""
    cluster: int
    """Thread blocks that share a band's columns."""

    @property
    def groups(self) -> int:
        """Of warps that take units of a narrow band by turns."""
        return 4 // -(-self.tiles // 4)

    @property
    def band_rows(self) -> int:
        """Rows of the matrix in a band."""
        return TILE_ROWS * self.tiles

    def threads(self, columns: int) -> int:
        """Of a thread block, for so many rows of x."""
        return 32 * (-(-self.tiles // 4) * 4 * self.groups + 1 + ROW_WARPS[columns])


@cache
def best_cut(n: int, k: int, rooms: tuple[tuple[int, int], ...]) -> Cut:
    """The cut of a matrix `[n, k]` with the least work for the busiest thread block.

    `rooms`: sizes of clusters, and how many of each run at once.
    """
    units = -(-k // UNIT_COLUMNS)

    def cost(cut: Cut, room: int) -> float:
        rounds = -(-n // cut.band_rows) / room
        meeting = BLOCKS_MEET if cut.cluster > 1 else GROUPS_MEET if cut.groups > 1 else 0
        if meeting and (rounds > 1 or cut.cluster > units):
            return float("inf")
        slowness = max(1.0, USUAL_WARPS / (cut.tiles * cut.groups))
        return slowness * cut.tiles * -(-units // cut.cluster) * -(-rounds // 1) + meeting

    cuts = [(cost(Cut(tiles, size), room), -tiles, size) for size, room in rooms for tiles in TILES if room]
    _, tiles, size = min(cuts)
    return Cut(-tiles, size)


@dataclass(frozen=True)
class StreamShape:
    """How a kernel spreads over shared memory. No choice here changes a bit of a result."""

    columns: int
    """Rows of x, one of `COLUMNS`."""
    stage_units: int
    """Of 64 columns of the weight, in a stage of the ring."""
    stages: int

    def key(
        self,
        form: Form,
        cut: Cut,
        element: Element,
        float_out: bool,
        arch: str = ARCHITECTURE,
        activation: Activation | None = None,
    ) -> KernelKey:
        """The kernel for a form of weight; `element` is that of x and out."""
        constants = form.constants | {
            "TILES": cut.tiles,
            "CLUSTER": cut.cluster,
            "COLUMNS": self.columns,
            "STAGE_UNITS": self.stage_units,
            "STAGES": self.stages,
            "ROW_WARPS": ROW_WARPS[self.columns],
            "ROW_DEPTH": ROW_DEPTH,
            "SHARED_BYTES": SHARED_BYTES,
            "BFLOAT": element == "bfloat16",
            "FLOAT_OUT": float_out,
            "GATED": gated(activation),
        }
        return KernelKey.of("stream_codes", constants, arch)


def stream_shape(form: Form, cut: Cut, columns: int, units: int) -> StreamShape:
    """Stages for `units` of a band in each thread block: large, but not much more of them than it takes."""
    of_rows = ROW_WARPS[columns] * ROW_DEPTH * columns * 128
    of_weight = cut.tiles * (128 * form.bits + 32 * form.factor_words)
    found: list[tuple[bool, float, int, int]] = []
    for each in (16, 8, 4, 2, 1):
        stage = -(-each * (128 * columns + of_weight) // 1024) * 1024
        extra = 4 * each * columns + 48  # powers of two that rows were scaled by, barriers
        stages = (SHARED_BYTES - of_rows) // (stage + extra)
        if stages >= 2 and each % cut.groups == 0 and each <= STAGE_UNITS[columns]:
            cost = -(-units // each) * (each + STAGE * cut.groups)
            found.append((stages < ENOUGH_STAGES, cost, each, stages))
    if not found:
        raise ValueError(f"a stage of {form} does not fit")
    return StreamShape(columns, *min(found)[2:])


def prepares(columns: int) -> bool:
    """Whether a kernel ahead of the product makes x, padded to so many rows, what thread blocks copy."""
    return ROW_WARPS[columns] == 0


def halves_shape(cut: Cut, columns: int, units: int, stage_units: int) -> HalvesShape:
    """Of prepared rows: whole stages for each of a cluster's thread blocks, which have `units` at most."""
    return HalvesShape(cut.cluster, -(-units // stage_units) * stage_units, columns)


class StreamCodes:
    """Products of x with matrices of codes, on CuPy's current stream; only `load` allocates, nothing waits.

    The matrix is rounded to halves, whatever x is. A row's bits depend neither on the number of rows nor on
    the others, but on the size of the matrix and on the device.
    """

    def __init__(
        self,
        element: Element,
        kernels: KernelCache,
        processors: int,
        rooms: Rooms | None = None,
        shape_of: Callable[[Form, Cut, int, int], StreamShape] = stream_shape,
    ) -> None:
        """`rooms`: clusters that run at once, by their size; None: as many as the device says."""
        self._processors = processors
        self._rooms = rooms

        @cache
        def kernel(
            form: Form, cut: Cut, float_out: bool, columns: int, units: int, activation: Activation | None
        ) -> tuple[Any, int]:
            shape = shape_of(form, cut, columns, units)
            key = shape.key(form, cut, element, float_out, activation=activation)
            return kernels.load(key, SHARED_BYTES), shape.stage_units

        self._kernel = kernel

        self._halve = HalveRows(element, kernels)

    def __call__(
        self, x: Any, weight: CodedMatrix, bias: Any, out: Any, activation: Activation | None = None
    ) -> None:
        """Write `x @ weight.T (+ bias)` to `out`.

        Args:
            x: `[rows, k]` uint16; more than `MOST_ROWS` rows read the weight anew for each so many.
            weight: the matrix `[n, k]`.
            bias: `[n]` uint16, or None.
            out: `[rows, n]`, uint16 for elements or float32.
            activation: of a gated weight (`gated_order`), on sums in float32; then out is `[rows, n / 2]`,
                `activation(gate) * up`.
        """
        for start in range(0, len(x), MOST_ROWS):
            end = start + MOST_ROWS
            self._launch(x[start:end], weight, bias, out[start:end], activation)

    def load(
        self, weight: CodedMatrix, float_out: bool, rows: int, activation: Activation | None = None
    ) -> None:
        """Have the kernels for 1 up to `rows` rows compiled, and the memory of prepared rows taken.

        Products with other numbers of rows do so when they come first.
        """
        cut, units = self._cut(weight)
        for columns in COLUMNS:
            _, stage_units = self._kernel(weight.form, cut, float_out, columns, units, activation)
            if prepares(columns):
                shape = halves_shape(cut, columns, units, stage_units)
                self._halve.load(weight.codes, weight.form, shape)
            if columns >= rows:
                return

    def _cut(self, weight: CodedMatrix) -> tuple[Cut, int]:
        """The cut of a matrix, and how many units of a band a thread block has."""
        if self._rooms is None:
            most = Cut(TILES[-1], 1)
            kernel, _ = self._kernel(weight.form, most, False, COLUMNS[0], 1, None)
            rooms = find_rooms(kernel, most.threads(COLUMNS[0]), SHARED_BYTES, range(2, PORTABLE + 1))
            self._rooms = {1: self._processors, **rooms}
        cut = best_cut(*weight.shape, tuple(self._rooms.items()))
        return cut, -(-weight.shape[1] // (UNIT_COLUMNS * cut.cluster))

    def _launch(
        self, x: Any, weight: CodedMatrix, bias: Any, out: Any, activation: Activation | None
    ) -> None:
        n, k = weight.shape
        cut, units = self._cut(weight)
        columns = next(columns for columns in COLUMNS if columns >= len(x))
        floats = out.dtype == np.float32
        kernel, stage_units = self._kernel(weight.form, cut, floats, columns, units, activation)
        box = (cut.tiles // 2, stage_units)
        by_rows = weight.form.row_scaled  # then there are no factors to be copied
        maps = (planes_map(weight.codes, box), planes_map(weight.codes if by_rows else weight.factors, box))
        bands = -(-n // cut.band_rows)
        blocks = bands * cut.cluster if cut.cluster > 1 else min(bands, self._processors)
        brought = x
        if prepares(columns):
            shape = halves_shape(cut, columns, units, stage_units)
            self._halve.load(weight.codes, weight.form, shape)
            brought = self._halve(x, weight.form, shape)
        arguments = (
            brought, *maps, weight.factors if by_rows else 0, 0 if bias is None else bias, np.int32(len(x)),
            np.int32(n), np.int32(k), np.float32(weight.unit), out,
        )  # fmt: skip
        kernel((blocks,), (cut.threads(columns),), arguments, shared_mem=SHARED_BYTES)
