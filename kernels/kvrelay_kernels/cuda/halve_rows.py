"""Rows of x as halves, once for all thread blocks of a product (`sources/halve_rows.cu`)."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kvrelay_kernels.cuda.coded_matrix import UNIT_COLUMNS, Form
from kvrelay_kernels.cuda.module import KernelCache, KernelKey
from kvrelay_kernels.cuda.stream_rows import ARCHITECTURE
from kvrelay_kernels.quant.formats import Element

WARPS = 4
"""Of a thread block; each takes `WARP_ROWS` rows of 64 columns."""
WARP_ROWS = 4
POWER_BYTES = 4
"""Of the power of two that 64 columns of a row are multiplied with."""


@dataclass(frozen=True)
class HalvesShape:
    """How prepared rows lie in memory: `[parts, units, columns, 64]` halves, with powers of two behind."""

    parts: int
    """Of x's columns, as equal as may be; each begins anew."""
    units: int
    """Of 64 columns in each part, zeros where it has fewer."""
    columns: int
    """Rows of x, padded with zeros."""

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return self.parts * self.units * self.columns * (2 * UNIT_COLUMNS + POWER_BYTES)


def halve_key(form: Form, element: Element, arch: str = ARCHITECTURE) -> KernelKey:
    """The kernel for weights of a form, which decides the order of columns; `element` is that of x."""
    constants = form.constants | {"WARPS": WARPS, "BFLOAT": element == "bfloat16"}
    return KernelKey.of("halve_rows", constants, arch)


class HalveRows:
    """Rows as halves on CuPy's current stream; nothing waits, and only `load` allocates."""

    def __init__(self, element: Element, kernels: KernelCache) -> None:
        @cache
        def kernel(form: Form) -> Any:
            return kernels.load(halve_key(form, element), 0)

        self._kernel = kernel
        self._halves: dict[HalvesShape, Any] = {}

    def load(self, weight: Any, form: Form, shape: HalvesShape) -> None:
        """Have the kernel compiled, and its memory taken on the device of `weight`.

        That is never given back: recorded launches have its address.
        """
        self._kernel(form)
        if shape not in self._halves:
            self._halves[shape] = np.empty_like(weight, np.uint8, shape=(shape.nbytes,))

    def __call__(self, x: Any, form: Form, shape: HalvesShape) -> Any:
        """x `[rows, k]` uint16, prepared for weights of a form, until the next call with this shape.

        What it takes was loaded before.
        """
        halves = self._halves[shape]
        warps = shape.parts * shape.units * shape.columns // WARP_ROWS
        rows, k, columns, parts, units = map(np.int32, (*x.shape, shape.columns, shape.parts, shape.units))
        arguments = (x, rows, k, columns, parts, units, halves)
        self._kernel(form)((-(-warps // WARPS),), (32 * WARPS,), arguments)
        return halves
