"""Weights as MLX keeps them: plain matrices, or packed affine codes for `quantized_matmul`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import HostWeight, WeightMode
from kvrelay_kernels.quant import AffineWeight
from kvrelay_kernels.quant.affine import pack_codes
from kvrelay_kernels.quant.weights import concatenate, quantize_weight

GROUPS = (64, 32)
"""Groups that MLX multiplies with, the larger first: fewer scales to read."""
MODE_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class FloatLinear:
    """`[rows, columns]` in the backend's element."""

    weight: mx.array
    bias: mx.array | None

    def apply(self, x: mx.array) -> mx.array:
        """`x @ weight.T + bias`."""
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias

    def rows(self, ids: mx.array) -> mx.array:
        """Some rows of the matrix."""
        return self.weight[ids]


@dataclass(frozen=True)
class AffineLinear:
    """Packed codes `[rows, words]` with scales and biases `[rows, groups]`."""

    codes: mx.array
    scales: mx.array
    offsets: mx.array
    bits: int
    group: int
    bias: mx.array | None

    def apply(self, x: mx.array) -> mx.array:
        """`x @ weight.T + bias`."""
        product = mx.quantized_matmul(
            x, self.codes, self.scales, self.offsets, transpose=True, group_size=self.group, bits=self.bits
        )
        return product if self.bias is None else product + self.bias

    def rows(self, ids: mx.array) -> mx.array:
        """Some rows of the matrix."""
        return mx.dequantize(
            self.codes[ids], self.scales[ids], self.offsets[ids], group_size=self.group, bits=self.bits
        )


MlxLinear = FloatLinear | AffineLinear


def pack(
    parts: Sequence[HostWeight], mode: WeightMode, bias: NDArray[Any] | None, element: mx.Dtype
) -> MlxLinear:
    """Parts below each other; codes are kept where the mode allows and MLX knows their group.

    Raises:
        FormatUnsupported: the mode calls for codes, but no group divides the columns.
    """
    host_bias = None if bias is None else mx.array(np.asarray(bias, np.float32)).astype(element)
    affine = _affine(parts, mode)
    if affine is None:
        dense = [part.dequantize() if isinstance(part, AffineWeight) else part for part in parts]
        whole = np.concatenate([np.asarray(part, np.float32) for part in dense])
        return FloatLinear(mx.array(whole).astype(element), host_bias)
    return AffineLinear(
        mx.array(pack_codes(affine.codes, affine.bits)),
        mx.array(affine.scales).astype(element),
        mx.array(affine.biases).astype(element),
        affine.bits,
        affine.group,
        host_bias,
    )


def _affine(parts: Sequence[HostWeight], mode: WeightMode) -> AffineWeight | None:
    """The parts as one matrix of codes; None where they are to be floats."""
    if mode == "float":
        return None
    coded = [part for part in parts if isinstance(part, AffineWeight)]
    fits = len(coded) == len(parts) and all(part.group in GROUPS and part.bits in (4, 8) for part in coded)
    if mode == "auto":
        return concatenate(coded) if fits else None
    bits = MODE_BITS[mode]
    if fits and all(part.bits <= bits for part in coded):
        return concatenate(coded)
    dense = [
        part.dequantize() if isinstance(part, AffineWeight) else np.asarray(part, np.float32)
        for part in parts
    ]
    columns = dense[0].shape[1]
    group = next((group for group in GROUPS if columns % group == 0), None)
    if group is None:
        raise FormatUnsupported(f"{mode} weights: no group of {GROUPS} divides {columns} columns")
    return quantize_weight(np.concatenate(dense), bits, group)
