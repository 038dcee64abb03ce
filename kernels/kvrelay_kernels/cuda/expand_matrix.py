"""Matrices of codes -> 16-bit elements, for products of many rows (`sources/expand_matrix.cu`)."""

from typing import Any

import numpy as np

from kvrelay_kernels.cuda.coded_matrix import CodedMatrix, Form
from kvrelay_kernels.cuda.module import KernelCache, KernelKey, device_arch
from kvrelay_kernels.quant.formats import Element

THREADS = 256
ITEMS = 4
"""That a thread writes."""


def expand_matrix_key(form: Form, element: Element, arch: str) -> KernelKey:
    """The kernel for a form of matrix."""
    return KernelKey.of("expand_matrix", form.constants | {"BFLOAT": element == "bfloat16"}, arch)


class ExpandMatrix:
    """Writes `scale * code + bias`, rounded once, on CuPy's current stream."""

    def __init__(self, element: Element, kernels: KernelCache) -> None:
        self._element: Element = element
        self._kernels = kernels
        self._arch = device_arch()

    def __call__(self, matrix: CodedMatrix, out: Any) -> None:
        """The values of `matrix`, row by row, to `out`: uint16 of its size."""
        n, k = matrix.shape
        kernel = self._kernels.load(expand_matrix_key(matrix.form, self._element, self._arch), 0)
        blocks = -(-n * k // (ITEMS * THREADS))
        kernel(
            (blocks,),
            (THREADS,),
            (matrix.codes, matrix.factors, np.int32(k), np.int64(n * k), np.float32(matrix.unit), out),
        )
