"""Weights as MLX keeps them: plain matrices, or packed affine codes for `quantized_matmul`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.interface import HostWeight, WeightMode
from kvrelay_kernels.quant import AffineWeight
from kvrelay_kernels.quant.affine import pack_codes
from kvrelay_kernels.quant.weights import as_floats, concatenate, in_mode

GROUPS, BITS = (32, 64), (4, 8)
"""Of codes that MLX multiplies with."""


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

    It knows none of 8-bit floats: these become elements.

    Raises:
        FormatUnsupported: the mode calls for codes, but no group divides the columns.
    """
    host_bias = None if bias is None else mx.array(np.asarray(bias, np.float32)).astype(element)
    parts = [in_mode(part, mode) for part in parts]
    affine = _affine(parts)
    if affine is None:
        whole = np.concatenate([as_floats(part) for part in parts])
        return FloatLinear(mx.array(whole).astype(element), host_bias)
    return AffineLinear(
        mx.array(pack_codes(affine.codes, affine.bits)),
        mx.array(affine.scales).astype(element),
        mx.array(affine.biases).astype(element),
        affine.bits,
        affine.group,
        host_bias,
    )


def _affine(parts: Sequence[HostWeight]) -> AffineWeight | None:
    """The parts as one matrix of codes; None where some have none, or MLX has no such groups."""
    coded = [part for part in parts if isinstance(part, AffineWeight)]
    if len(coded) < len(parts):
        return None
    whole = concatenate(coded)
    return whole if whole.group in GROUPS and whole.bits in BITS else None
