"""Products of 1 to 64 rows with a weight, at the speed of reading it (`sources/few_rows.cu`)."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kvrelay_kernels.cuda.activation import gated
from kvrelay_kernels.cuda.coded_matrix import ELEMENTS, TILE_ROWS, UNIT_COLUMNS, CodedMatrix, Form
from kvrelay_kernels.cuda.module import KernelCache, KernelKey, device_arch
from kvrelay_kernels.interface import Activation
from kvrelay_kernels.quant.formats import Element

MOST_ROWS = 64
"""Of x in one launch."""
WARPS = 8
NIBBLES = 0x000F000F
COLUMNS = (1, 2, 4, 8)


@dataclass(frozen=True)
class FewRowsShape:
    """How the work is spread. No choice here changes a bit of a result."""

    tiles: int
    """Of 16 weight rows that a thread block works on at once."""
    columns: int
    """Of 8 rows of x, one of `COLUMNS`; `tiles * columns` is at most 8, for shared memory's sake."""
    depth: int
    """Units of 64 columns that a warp has asked for ahead."""
    blocks_per_sm: int

    def key(
        self,
        form: Form,
        ragged: bool,
        element: Element,
        float_out: bool,
        arch: str,
        activation: Activation | None = None,
    ) -> KernelKey:
        """The kernel for a form of weight; `ragged`: 64 does not divide its columns."""
        constants = form.constants | {
            "TILES": self.tiles,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "BLOCKS_PER_SM": self.blocks_per_sm,
            "RAGGED": ragged,
            "BFLOAT": element == "bfloat16",
            "FLOAT_OUT": float_out,
            "GATED": gated(activation),
        }
        return KernelKey.of("few_rows", constants, arch)

    def blocks(self, n: int, processors: int) -> int:
        """Thread blocks for `n` weight rows, each with the same number of them but for one."""
        bands = -(-n // (TILE_ROWS * self.tiles))
        rounds = -(-bands // (processors * self.blocks_per_sm))
        return -(-bands // rounds)


def few_rows_shape(form: Form, columns: int) -> FewRowsShape:
    """The choice for a form of weight and so many times 8 rows: without spills, not yet measured."""
    registers = form.bits + form.factor_words
    depth = 4 if registers <= 8 else 2 if registers <= 12 else 1
    if columns == 4 and registers > 8:
        depth *= 2  # one thread block alone on a multiprocessor: what it asks for is all that is on its way
    # Two tiles share what activations cost, where they cost most and registers are left.
    tiles = 2 if columns == 4 and registers <= 8 else 1
    return FewRowsShape(tiles, columns, depth, {1: 3, 2: 2}.get(columns, 1))


class FewRows:
    """Products of x with weights of every form, on CuPy's current stream; neither allocates nor waits.

    A row's bits depend neither on the number of rows nor on the others. They are not those of cuBLASLt.
    """

    def __init__(self, element: Element, kernels: KernelCache, processors: int) -> None:
        self._processors = processors
        arch = device_arch()

        @cache
        def kernel(
            form: Form, ragged: bool, float_out: bool, columns: int, activation: Activation | None
        ) -> tuple[Any, FewRowsShape]:
            shape = few_rows_shape(form, columns)
            return kernels.load(shape.key(form, ragged, element, float_out, arch, activation), 0), shape

        self._kernel = kernel

    def __call__(
        self, x: Any, weight: Any, bias: Any, out: Any, activation: Activation | None = None
    ) -> None:
        """Write `x @ weight.T (+ bias)` to `out`.

        Args:
            x: `[rows, k]` uint16; more than `MOST_ROWS` rows read the weight anew for each so many.
            weight: a `CodedMatrix`, or uint16 `[n, k]` with k a multiple of 8.
            bias: `[n]` uint16, or None.
            out: `[rows, n]`, uint16 for elements or float32.
            activation: of a gated weight (`gated_order`), on sums in float32; then out is `[rows, n / 2]`,
                `activation(gate) * up`.
        """
        for start in range(0, len(x), MOST_ROWS):
            end = start + MOST_ROWS
            self._launch(x[start:end], weight, bias, out[start:end], activation)

    def load(self, weight: Any, float_out: bool, rows: int, activation: Activation | None = None) -> None:
        """Have the kernels for 1 up to `rows` rows compiled."""
        for columns in COLUMNS:
            self._kernel(_form(weight), _ragged(weight), float_out, columns, activation)
            if 8 * columns >= rows:
                return

    def _launch(self, x: Any, weight: Any, bias: Any, out: Any, activation: Activation | None) -> None:
        n, k = weight.shape
        columns = next(columns for columns in COLUMNS if 8 * columns >= len(x))
        floats = out.dtype == np.float32
        kernel, shape = self._kernel(_form(weight), _ragged(weight), floats, columns, activation)
        coded = isinstance(weight, CodedMatrix)
        data, factors, unit = (weight.codes, weight.factors, weight.unit) if coded else (weight, 0, 1)
        sizes = map(np.int32, (len(x), n, k, NIBBLES))
        grid = (shape.blocks(n, self._processors),)
        arguments = (x, data, factors, 0 if bias is None else bias, *sizes, np.float32(unit), out)
        kernel(grid, (32 * WARPS,), arguments)


def _form(weight: Any) -> Form:
    return weight.form if isinstance(weight, CodedMatrix) else ELEMENTS


def _ragged(weight: Any) -> bool:
    return weight.shape[1] % UNIT_COLUMNS != 0
