"""Weights as they come from a loader -> 16-bit elements on the device."""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.gemm import CudaLinear
from kvrelay_kernels.cuda.module import KernelCache, KernelKey, device_arch
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import HostWeight, WeightMode
from kvrelay_kernels.quant import AffineWeight
from kvrelay_kernels.quant.formats import Element
from kvrelay_kernels.quant.weights import MODE_BITS, as_codes

ALIGNED = 8
"""Columns of a matrix are a multiple of it: 16 bytes."""
THREADS = 256
_SOURCES: dict[Any, int] = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}
_CODES = 3
_ELEMENTS: dict[Element, Any] = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class WeightLoader:
    """Puts matrices on the device; codes and floats of another type are converted there.

    Affine codes become scale * code + bias in float32 and are then rounded once, in every mode.
    """

    def __init__(self, element: Element, kernels: KernelCache) -> None:
        self._element: Element = element
        self._kernels = kernels

    def matrix(self, parts: Sequence[HostWeight], mode: WeightMode, bias: NDArray[Any] | None) -> CudaLinear:
        """The parts, rows below each other, as one matrix.

        Raises:
            FormatUnsupported: sizes that kernels cannot read, or columns that no group of codes divides.
            MemoryError: it does not fit on the device.
        """
        import cupy  # pyright: ignore[reportMissingImports]

        n, k = sum(part.shape[0] for part in parts), parts[0].shape[1]
        if k % ALIGNED:
            raise FormatUnsupported(f"a matrix of {n} x {k}: on CUDA, columns are a multiple of {ALIGNED}")
        weight = cupy.empty((n, k), np.uint16)
        row = 0
        for part in parts:
            source = as_codes(part, MODE_BITS[mode]) if mode in MODE_BITS else part
            self._put(source, weight[row : row + part.shape[0]])
            row += part.shape[0]
        offsets = None
        if bias is not None:
            offsets = cupy.empty(n, np.uint16)
            self._put(np.asarray(bias, np.float32), offsets)
        return CudaLinear(weight, offsets)

    def _put(self, source: Any, out: Any) -> None:
        """Convert a matrix or a vector into `out`, uint16 of the same size."""
        import cupy  # pyright: ignore[reportMissingImports]

        if isinstance(source, AffineWeight):
            factors = [
                cupy.asarray(np.ascontiguousarray(part, np.float32))
                for part in (source.scales, source.biases)
            ]
            self._convert(_CODES, cupy.asarray(source.codes), out, factors, source.group)
            return
        if source.dtype not in _SOURCES:
            raise FormatUnsupported(f"weights of type {source.dtype}")
        # Arrays that already lie on the device stay there. Their bits alone are moved: not every library
        # knows bfloat16.
        bits = source.view(np.uint16 if source.dtype.itemsize == 2 else np.uint32)
        bits = cupy.ascontiguousarray(cupy.asarray(bits))
        if source.dtype == _ELEMENTS[self._element]:
            out[...] = bits
        else:
            self._convert(_SOURCES[source.dtype], bits, out, (0, 0), 1)

    def _convert(self, kind: int, source: Any, out: Any, factors: Sequence[Any], group: int) -> None:
        key = convert_key(kind, self._element, device_arch())
        kernel = self._kernels.load(key, 0)
        blocks = -(-out.size // (4 * THREADS))
        kernel((blocks,), (THREADS,), (source, *factors, np.int32(group), np.int64(out.size), out))


def convert_key(kind: int, element: Element, arch: str) -> KernelKey:
    """The kernel that turns one kind of source into elements."""
    return KernelKey.of("convert", {"SOURCE": kind, "BFLOAT": element == "bfloat16"}, arch)
