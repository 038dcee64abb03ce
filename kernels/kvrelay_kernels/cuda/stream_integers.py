"""Products of 1 to 4 rows with codes on Hopper, by 16-bit integers (`sources/stream_integers.cu`)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from kvrelay_kernels.cuda.activation import gated
from kvrelay_kernels.cuda.coded_matrix import TILE_ROWS, UNIT_COLUMNS, CodedMatrix, Form
from kvrelay_kernels.cuda.module import KernelCache, KernelKey
from kvrelay_kernels.cuda.stream_rows import ARCHITECTURE
from kvrelay_kernels.cuda.tensor_map import planes_map
from kvrelay_kernels.interface import Activation
from kvrelay_kernels.quant.formats import Element

ROWS = (1, 2, 4)
"""Of x in one launch."""
WARPS = 16
"""That multiply, at most."""
ALONE = 8192
"""Elements of x that a thread block rounds for itself; of more, clusters of two share the work."""
MOST_ODD = 5
"""Up to which a band's number of tiles may be odd: then each is brought by itself."""
SHARED_BYTES = 216 << 10
"""Small kernels find room beside it."""
PLACE_BYTES = 21 << 10
"""Of a stage, at most, where there is a choice; twice as much where all stages find room at once, or where
each has many copies."""
ENOUGH_STAGES, LEAST_STAGES = 4, 2
"""That hide what memory takes, and that do where x leaves no more room."""
BOX_ALIGNMENT = 128
"""Of what the copy engine brings, in shared memory."""
BAND = 0.25
"""What a band costs beside its tiles, in tiles."""
SPAN_STEPS = 4
"""Steps of columns in a span: as many pairs as an operand has."""


@dataclass(frozen=True)
class Cut:
    """How a matrix is cut; it decides the order of sums, so it must not depend on x."""

    tiles: int
    """Of 16 rows in a band, which is a thread block's."""

    @property
    def warp_tiles(self) -> int:
        """Tiles of a warp, which share what x costs: pairs, where they lie so."""
        return 2 if self.tiles % 2 == 0 else 3 if self.tiles == 3 else 1

    @property
    def splits(self) -> int:
        """Warps that take the spans of these by turns, a power of two."""
        return 1 << (WARPS * self.warp_tiles // self.tiles).bit_length() - 1

    @property
    def band_rows(self) -> int:
        """Rows of the matrix in a band."""
        return TILE_ROWS * self.tiles

    @property
    def threads(self) -> int:
        """Of a thread block; one warp copies."""
        return 32 * (self.tiles // self.warp_tiles * self.splits + 1)


@cache
def best_cut(n: int, processors: int) -> Cut:
    """The cut of `n` rows with the least work for the busiest thread block."""
    bands = [band for band in range(1, WARPS + 1) if band % 2 == 0 or band <= MOST_ODD]
    tiles = -(-n // TILE_ROWS)
    return Cut(min(bands, key=lambda band: -(-tiles // (band * processors)) * (band + BAND)))


@dataclass(frozen=True)
class StreamShape:
    """How a kernel spreads over shared memory. No choice here changes a bit of a result."""

    rows: int
    """Of x, one of `ROWS`."""
    stage_spans: int
    """Of four steps of columns, in a stage of the ring; a power of two, as the cut's splits are."""
    stages: int
    """A multiple of those from one of a warp's to its next: so a warp knows each place's last filling."""
    cluster: int = 1
    """Thread blocks that share the rounding of x."""

    def ring_bytes(self, form: Form, cut: Cut) -> int:
        """Shared memory beside what x takes."""
        totals = 4 * TILE_ROWS * cut.tiles * cut.splits * self.rows
        return self.stages * (stage_bytes(form, cut, self.stage_spans) + 16) + totals

    def spans(self, form: Form, cut: Cut, k: int) -> int:
        """Of `k` columns, filled up until each warp has had as many."""
        each = max(self.stage_spans, cut.splits)
        return -(-k // (each * span_columns(form))) * each

    def shared_bytes(self, form: Form, cut: Cut, k: int) -> int:
        """With x."""
        spans = self.spans(form, cut, k)
        return self.ring_bytes(form, cut) + spans * self.rows * (2 * span_columns(form) + 8 * SPAN_STEPS)

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
            "WARP_TILES": cut.warp_tiles,
            "SPLITS": cut.splits,
            "CLUSTER": self.cluster,
            "ROWS": self.rows,
            "STAGE_SPANS": self.stage_spans,
            "STAGES": self.stages,
            "RING_BYTES": self.ring_bytes(form, cut),
            "BFLOAT": element == "bfloat16",
            "FLOAT_OUT": float_out,
            "GATED": gated(activation),
        }
        return KernelKey.of("stream_integers", constants, arch)


def span_columns(form: Form) -> int:
    """Columns of a span: four steps of 32, or of 16 where a scale is of no more."""
    return SPAN_STEPS * min(32, form.group)


def stage_bytes(form: Form, cut: Cut, spans: int) -> int:
    """Codes and factors of so many spans of a band."""
    units = spans * span_columns(form) // UNIT_COLUMNS
    return cut.tiles * units * (128 * form.bits + 32 * form.factor_words)


def stream_shape(form: Form, cut: Cut, rows: int, k: int, bands: int) -> StreamShape | None:
    """As many stages as there is room for, or as a thread block fills; None where x leaves no room.

    Args:
        form: of the weight.
        cut: of the weight.
        rows: of x, one of `ROWS`.
        k: columns.
        bands: that a thread block has.
    """
    cluster = 1 if rows * k <= ALONE else 2
    spans = cut.splits
    while stage_bytes(form, cut, spans) % BOX_ALIGNMENT:
        spans *= 2
    found: list[StreamShape] = []
    while spans and stage_bytes(form, cut, spans) % BOX_ALIGNMENT == 0:
        none = StreamShape(rows, spans, 0, cluster)
        room = SHARED_BYTES - none.shared_bytes(form, cut, k)
        needed = none.spans(form, cut, k) // spans * bands
        turns = -(-cut.splits // spans)
        stages = min(room // (stage_bytes(form, cut, spans) + 16), needed) // turns * turns
        if stages >= min(LEAST_STAGES, needed):
            found.append(replace(none, stages=stages))
            most = PLACE_BYTES * (2 if stages == needed or cut.tiles % 2 else 1)
            if stage_bytes(form, cut, spans) <= most and stages >= min(ENOUGH_STAGES, needed):
                break
        spans //= 2
    return found[-1] if found else None


class StreamIntegers:
    """Products of x with matrices of codes, on CuPy's current stream; neither allocates nor waits.

    x is rounded to 16-bit integers, with a step for 32 columns of a row, or for 16 where scales are of no
    more. A row's bits depend neither on the number of rows nor on the others, but on the size of the matrix
    and on the device.
    """

    def __init__(
        self,
        element: Element,
        kernels: KernelCache,
        processors: int,
        shape_of: Callable[[Form, Cut, int, int, int], StreamShape | None] = stream_shape,
    ) -> None:
        """`processors` of the device share the work."""
        self._processors, self._shape_of = processors, cache(shape_of)

        @cache
        def kernel(
            form: Form, cut: Cut, shape: StreamShape, k: int, float_out: bool, activation: Activation | None
        ) -> Any:
            key = shape.key(form, cut, element, float_out, activation=activation)
            return kernels.load(key, shape.shared_bytes(form, cut, k))

        self._kernel = kernel

    def takes(self, weight: CodedMatrix, rows: int) -> bool:
        """Whether it multiplies so many rows with a weight: of integers, with x in shared memory."""
        return not weight.floats and rows <= ROWS[-1] and self._shape(weight, rows) is not None

    def __call__(
        self, x: Any, weight: CodedMatrix, bias: Any, out: Any, activation: Activation | None = None
    ) -> None:
        """Write `x @ weight.T (+ bias)` to `out`.

        Args:
            x: `[rows, k]` uint16; so many rows as it `takes`.
            weight: the matrix `[n, k]`.
            bias: `[n]` uint16, or None.
            out: `[rows, n]`, uint16 for elements or float32.
            activation: of a gated weight (`gated_order`), on sums in float32; then out is `[rows, n / 2]`,
                `activation(gate) * up`.

        Raises:
            KernelError: the driver refused; the message holds its code.
        """
        n, k = weight.shape
        cut = self._cut(weight)
        kernel, shape = self._loaded(weight, len(x), out.dtype == np.float32, activation)
        units = shape.stage_spans * span_columns(weight.form) // UNIT_COLUMNS
        planes, parts = (1, 2) if cut.tiles % 2 else (cut.tiles // 2, 1)
        maps = [planes_map(part, (planes, units), parts) for part in (weight.codes, weight.factors)]
        arguments = (
            x, *maps, 0 if bias is None else bias, *map(np.int32, (len(x), n, k)),
            np.float32(weight.unit), out,
        )  # fmt: skip
        blocks = min(-(-n // cut.band_rows), self._processors)
        grid = (-(-blocks // shape.cluster) * shape.cluster,)
        kernel(grid, (cut.threads,), arguments, shared_mem=shape.shared_bytes(weight.form, cut, k))

    def load(
        self, weight: CodedMatrix, float_out: bool, rows: int, activation: Activation | None = None
    ) -> None:
        """Have the kernels for 1 up to `rows` rows compiled."""
        for count in ROWS:
            if self.takes(weight, count):
                self._loaded(weight, count, float_out, activation)
            if count >= rows:
                return

    def _cut(self, weight: CodedMatrix) -> Cut:
        return best_cut(weight.shape[0], self._processors)

    def _loaded(
        self, weight: CodedMatrix, rows: int, float_out: bool, activation: Activation | None
    ) -> tuple[Any, StreamShape]:
        """The kernel for so many rows, and its shape. Raises ValueError where it does not take them."""
        cut, shape = self._cut(weight), self._shape(weight, rows)
        if shape is None:
            raise ValueError(f"{rows} rows of {weight.shape[1]} columns do not fit shared memory")
        return self._kernel(weight.form, cut, shape, weight.shape[1], float_out, activation), shape

    def _shape(self, weight: CodedMatrix, rows: int) -> StreamShape | None:
        n, k = weight.shape
        cut = self._cut(weight)
        bands = -(-n // (cut.band_rows * self._processors))
        return self._shape_of(weight.form, cut, next(count for count in ROWS if count >= rows), k, bands)
