"""Products of few rows with codes on Hopper, at the speed of reading (`sources/stream_codes.cu`)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kvrelay_kernels.cuda.coded_matrix import TILE_ROWS, UNIT_COLUMNS, CodedMatrix, Form
from kvrelay_kernels.cuda.module import KernelCache, KernelKey
from kvrelay_kernels.cuda.stream_rows import ARCHITECTURE
from kvrelay_kernels.quant.formats import Element

MOST_ROWS = 64
"""Of x in one launch."""
COLUMNS = (8, 16, 32, 64)
"""To which rows of x are padded."""
CONSUMERS = 512
"""Threads that multiply: 16 warps, each a tile of the weight's rows."""
BAND_ROWS = CONSUMERS // 32 * TILE_ROWS
THREADS = CONSUMERS + 32 + 32 * 3
"""One warp more for the weight, three for x."""
SHARED_BYTES = 184 << 10
"""Small kernels find room beside it."""
LEAST_STAGES = 4
ROW_WARPS = 3
ROW_DEPTH = {8: 6, 16: 4, 32: 6, 64: 8}
"""Passes of x, of 8 or 16 rows of 64 columns, that each warp that brings it has asked for ahead."""
NIBBLES = 0x000F000F
MOST_BANDS = 4096
"""Of 256 rows."""


@dataclass(frozen=True)
class StreamShape:
    """How a kernel spreads over shared memory. No choice here changes a bit of a result."""

    columns: int
    """Rows of x, one of `COLUMNS`."""
    stage_units: int
    """Of 64 columns of the weight, in a stage of the ring."""
    stages: int

    def key(self, form: Form, element: Element, float_out: bool, arch: str = ARCHITECTURE) -> KernelKey:
        """The kernel for a form of weight; `element` is that of x and out."""
        constants = form.constants | {
            "COLUMNS": self.columns,
            "STAGE_UNITS": self.stage_units,
            "STAGES": self.stages,
            "ROW_DEPTH": ROW_DEPTH[self.columns],
            "THREADS": THREADS,
            "SHARED_BYTES": SHARED_BYTES,
            "BFLOAT": element == "bfloat16",
            "FLOAT_OUT": float_out,
        }
        return KernelKey.of("stream_codes", constants, arch)


def stream_shape(form: Form, columns: int) -> StreamShape:
    """Stages as large as they can be with `LEAST_STAGES` of them."""
    of_weight = BAND_ROWS * UNIT_COLUMNS * form.bits // 8 + CONSUMERS * form.factor_words
    row_bytes = ROW_WARPS * ROW_DEPTH[columns] * min(columns, 16) * 128
    for units in (4, 2, 1):
        stage = units * (128 * columns + of_weight)
        extra = 4 * units * columns + 32  # powers of two that rows were scaled by, barriers
        stages = (SHARED_BYTES - 16 - row_bytes) // (stage + extra)
        if stages >= LEAST_STAGES:
            return StreamShape(columns, units, stages)
    raise ValueError(f"a stage of {form} does not fit")


class StreamCodes:
    """Products of x with matrices of codes, on CuPy's current stream; neither allocates nor waits.

    The matrix is rounded to halves, whatever x is. A row's bits depend neither on the number of rows nor on
    the others, but on the number of multiprocessors.
    """

    def __init__(
        self,
        element: Element,
        kernels: KernelCache,
        processors: int,
        arrays: Any,
        shape_of: Callable[[Form, int], StreamShape] = stream_shape,
    ) -> None:
        """`processors` of the device share the work; `arrays`: the library, CuPy, or NumPy in tests."""
        self._processors = processors
        self._pieces = arrays.empty((2 * processors, BAND_ROWS, MOST_ROWS), np.float32)
        self._arrivals = arrays.zeros(MOST_BANDS, np.uint32)

        @cache
        def kernel(form: Form, float_out: bool, columns: int) -> Any:
            return kernels.load(shape_of(form, columns).key(form, element, float_out), SHARED_BYTES)

        self._kernel = kernel

    @staticmethod
    def takes(weight: Any) -> bool:
        """Whether it multiplies with a weight."""
        return isinstance(weight, CodedMatrix) and weight.shape[0] <= MOST_BANDS * BAND_ROWS

    def __call__(self, x: Any, weight: CodedMatrix, bias: Any, out: Any) -> None:
        """Write `x @ weight.T (+ bias)` to `out`.

        Args:
            x: `[rows, k]` uint16; more than `MOST_ROWS` rows read the weight anew for each so many.
            weight: the matrix `[n, k]`.
            bias: `[n]` uint16, or None.
            out: `[rows, n]`, uint16 for elements or float32.
        """
        for start in range(0, len(x), MOST_ROWS):
            self._launch(x[start : start + MOST_ROWS], weight, bias, out[start : start + MOST_ROWS])

    def load(self, weight: CodedMatrix, float_out: bool, rows: int) -> None:
        """Have the kernels for 1 up to `rows` rows compiled."""
        for columns in COLUMNS:
            self._kernel(weight.form, float_out, columns)
            if columns >= rows:
                return

    def _launch(self, x: Any, weight: CodedMatrix, bias: Any, out: Any) -> None:
        n, k = weight.shape
        columns = next(columns for columns in COLUMNS if columns >= len(x))
        kernel = self._kernel(weight.form, out.dtype == np.float32, columns)
        units = -(-n // BAND_ROWS) * -(-k // UNIT_COLUMNS)
        sizes = map(np.int32, (len(x), n, k))
        arguments = (x, weight.codes, weight.factors, 0 if bias is None else bias, *sizes)
        places = (self._pieces, self._arrivals, np.uint32(NIBBLES), out)
        kernel((min(self._processors, units),), (THREADS,), (*arguments, *places), shared_mem=SHARED_BYTES)
