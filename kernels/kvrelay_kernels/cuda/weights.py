"""Weights as they come from a loader -> codes or 16-bit elements on the device."""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.coded_matrix import TILE_ROWS, CodedMatrix, gated_order, pack_codes
from kvrelay_kernels.cuda.gemm import CudaLinear
from kvrelay_kernels.cuda.module import KernelCache, KernelKey, device_arch
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import HostWeight, WeightMode
from kvrelay_kernels.quant import AffineWeight, CodedWeight, ScaledWeight
from kvrelay_kernels.quant.formats import Element
from kvrelay_kernels.quant.weights import (
    FLOAT_MODE,
    MODE_BITS,
    finest_group,
    quantize_scaled,
    quantize_weight,
)

ALIGNED = 8
"""Columns of a matrix are a multiple of it: 16 bytes."""
THREADS = 256
_SOURCES: dict[Any, int] = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}
_CODES = 3
_ELEMENTS: dict[Element, Any] = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class WeightLoader:
    """Puts matrices on the device; codes and floats are packed, converted and rounded there.

    Codes stay codes wherever all parts have them, or get them by the mode, and kernels know their form. Parts
    of several widths take the widest, which loses nothing. Parts of several kinds become elements all
    together, and so do codes in mode `float`: scale * code + bias in float32, rounded once.
    """

    def __init__(self, element: Element, kernels: KernelCache) -> None:
        self._element: Element = element
        self._kernels = kernels

    def matrix(
        self,
        parts: Sequence[HostWeight],
        mode: WeightMode,
        bias: NDArray[Any] | None,
        gated: bool = False,
    ) -> CudaLinear:
        """The parts, rows below each other, as one matrix; `gated`: of a gate and its `up`, in `gated_order`.

        Raises:
            FormatUnsupported: sizes that kernels cannot read, or columns that no group of codes divides.
            MemoryError: it does not fit on the device.
        """
        import cupy  # pyright: ignore[reportMissingImports]

        n, k = sum(part.shape[0] for part in parts), parts[0].shape[1]
        if k % ALIGNED:
            raise FormatUnsupported(f"a matrix of {n} x {k}: on CUDA, columns are a multiple of {ALIGNED}")
        order = None
        if gated:
            if parts[0].shape != parts[1].shape or n % TILE_ROWS:
                raise FormatUnsupported(f"a gate and its `up` of {n} rows: on CUDA, {TILE_ROWS} divides them")
            order = cupy.asarray(gated_order(n))
        weight: Any = self._coded(parts, mode, order)
        if weight is None:
            weight = cupy.empty((n, k), np.uint16)
            row = 0
            for part in parts:
                self._put(part, weight[row : row + part.shape[0]])
                row += part.shape[0]
            if order is not None:
                weight = weight[order]
        offsets = None
        if bias is not None:
            offsets = cupy.empty(n, np.uint16)
            self._put(np.asarray(bias, np.float32), offsets)
        return CudaLinear(weight, offsets)

    def _coded(self, parts: Sequence[HostWeight], mode: WeightMode, order: Any) -> CodedMatrix | None:
        """The parts as one matrix of codes; None where they are to be elements."""
        import cupy  # pyright: ignore[reportMissingImports]

        kept = [_has_codes(part, mode) for part in parts]
        kinds = {type(part) for part in parts}
        if mode == "float" or (mode == "auto" and not (all(kept) and len(kinds) == 1)):
            return None
        coded = [_coded_there(part, mode) for part in parts]
        # What a file has is kept to the last bit; what is rounded here may have its scales rounded too.
        matrix = pack_codes(coded, rounded=not any(kept), order=order)
        del coded
        cupy.get_default_memory_pool().free_all_blocks()  # many times the codes, as floats
        return matrix

    def _put(self, source: Any, out: Any) -> None:
        """Convert a matrix or a vector into `out`, uint16 of the same size."""
        import cupy  # pyright: ignore[reportMissingImports]

        if isinstance(source, ScaledWeight):
            source = _there(source).dequantize()
        if isinstance(source, AffineWeight):
            factors = [
                cupy.ascontiguousarray(cupy.asarray(part), np.float32)
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


def _has_codes(part: HostWeight, mode: WeightMode) -> bool:
    """Whether a part comes in the codes that a mode has it in."""
    if isinstance(part, ScaledWeight):
        return mode in ("auto", FLOAT_MODE)
    return isinstance(part, AffineWeight) and (mode == "auto" or MODE_BITS.get(mode) == part.bits)


def _there(part: CodedWeight) -> CodedWeight:
    """Codes on the device."""
    import cupy  # pyright: ignore[reportMissingImports]

    put: Any = cupy.asarray
    if isinstance(part, ScaledWeight):
        return ScaledWeight(put(part.codes), put(part.scales), part.group)
    return AffineWeight(put(part.codes), put(part.scales), put(part.biases), part.bits)


def _coded_there(part: HostWeight, mode: WeightMode) -> CodedWeight:
    """A part in the codes of a mode, on the device; floats are rounded there.

    Raises FormatUnsupported where no group fits.
    """
    if isinstance(part, CodedWeight) and not _has_codes(part, mode):
        part = part.dequantize()
    if isinstance(part, CodedWeight):
        return _there(part)
    values = _floats(part)
    if mode == FLOAT_MODE:
        return quantize_scaled(values)
    return quantize_weight(values, MODE_BITS[mode], finest_group(part.shape[1]))


def _floats(part: NDArray[Any]) -> Any:
    """Floats of any width as float32 on the device."""
    import cupy  # pyright: ignore[reportMissingImports]

    if part.dtype.itemsize == 4:
        return cupy.asarray(part)
    bits = cupy.asarray(part.view(np.uint16))
    if part.dtype == np.float16:
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def convert_key(kind: int, element: Element, arch: str) -> KernelKey:
    """The kernel that turns one kind of source into elements."""
    return KernelKey.of("convert", {"SOURCE": kind, "BFLOAT": element == "bfloat16"}, arch)
