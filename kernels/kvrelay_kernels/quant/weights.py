"""Weights in codes: what GGUF's block types and files of 8-bit floats become, losslessly, and floats are
rounded to."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.quant.levels import E4M3_MAX, decode_e4m3, encode_e4m3

WEIGHT_GROUPS = (32, 64)
MODE_BITS = {"int8": 8, "int4": 4}
"""The weight modes that round to integers, whatever the file has."""
FLOAT_MODE = "fp8"
"""The one that rounds to 8-bit floats."""


@dataclass(frozen=True)
class AffineWeight:
    """A matrix `[rows, columns]` with value = scale * code + bias, one scale and bias per `group` columns.

    `codes` is uint8 `[rows, columns]` (unpacked; backends pack for their own reads), `scales` and
    `biases` are float32 `[rows, columns / group]`.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    biases: NDArray[np.float32]
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantize(self) -> NDArray[np.float32]:
        """The matrix as float32 `[rows, columns]`."""
        rows, columns = self.shape
        values = self.codes.reshape(rows, -1, self.group).astype(np.float32)
        values *= self.scales[..., None]
        values += self.biases[..., None]
        return values.reshape(rows, columns)

    def regroup(self, group: int) -> "AffineWeight":
        """The same matrix with a smaller group, scales repeated; lossless."""
        if self.group == group:
            return self
        if self.group % group:
            raise ValueError(f"a group of {self.group} cannot be cut into groups of {group}")
        times = self.group // group
        return AffineWeight(self.codes, self.scales.repeat(times, 1), self.biases.repeat(times, 1), self.bits)

    def rows(self, order: NDArray[np.intp]) -> "AffineWeight":
        """The matrix with its rows in `order`."""
        return AffineWeight(self.codes[order], self.scales[order], self.biases[order], self.bits)


@dataclass(frozen=True)
class ScaledWeight:
    """A matrix `[rows, columns]` of 8-bit floats, value = scale * number, one scale per `group` columns.

    `codes` is uint8 `[rows, columns]` (`quant.levels.decode_e4m3`; none is NaN), `scales` are float32
    `[rows, columns / group]`, rounded up: the last group of a row may be short.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> NDArray[np.float32]:
        """The matrix as float32 `[rows, columns]`."""
        values = decode_e4m3(self.codes)
        values *= self.scales if self.scales.shape[1] == 1 else self.regroup(1).scales
        return values

    def regroup(self, group: int) -> "ScaledWeight":
        """The same matrix with another group, scales repeated; lossless.

        Raises ValueError where a new group would have two scales.
        """
        groups = -(-self.shape[1] // group)
        if self.group % group and self.scales.shape[1] > 1:
            raise ValueError(f"a group of {self.group} cannot be cut into groups of {group}")
        times = groups if self.scales.shape[1] == 1 else self.group // group
        return ScaledWeight(self.codes, self.scales.repeat(times, 1)[:, :groups], group)

    def rows(self, order: NDArray[np.intp]) -> "ScaledWeight":
        """The matrix with its rows in `order`."""
        return ScaledWeight(self.codes[order], self.scales[order], self.group)


CodedWeight = AffineWeight | ScaledWeight


def concatenate_scaled(parts: list[ScaledWeight]) -> ScaledWeight:
    """Rows of all parts below each other, at the finest group among them; lossless."""
    group = min(part.group for part in parts)
    parts = [part.regroup(group) for part in parts]
    codes, scales = ([part.codes for part in parts], [part.scales for part in parts])
    return ScaledWeight(np.concatenate(codes), np.concatenate(scales), group)


def concatenate(parts: list[AffineWeight]) -> AffineWeight:
    """Rows of all parts below each other, at the widest codes and the finest group among them; lossless."""
    group = min(part.group for part in parts)
    parts = [part.regroup(group) for part in parts]
    return AffineWeight(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate([part.biases for part in parts]),
        max(part.bits for part in parts),
    )


def quantize_weight(values: NDArray[np.float32], bits: int, group: int) -> AffineWeight:
    """Round `[rows, columns]` floats to `bits`-bit codes: bias = minimum, scale = range / (2^bits - 1)."""
    rows, columns = values.shape
    if columns % group:
        raise ValueError(f"{columns} columns are not a multiple of the group of {group}")
    groups = values.reshape(rows, -1, group)
    low, high = groups.min(-1), groups.max(-1)
    scales = ((high - low) / np.float32(2**bits - 1)).astype(np.float32)
    divisor = np.where(scales == 0, np.float32(1), scales)[..., None]
    codes = np.clip(np.rint((groups - low[..., None]) / divisor), 0, 2**bits - 1).astype(np.uint8)
    return AffineWeight(codes.reshape(rows, columns), scales, low.astype(np.float32), bits)


def quantize_scaled(values: NDArray[np.float32]) -> ScaledWeight:
    """Round `[rows, columns]` floats to 8-bit ones: a row's largest becomes the largest there is.

    A row with NaN or infinity becomes NaN.
    """
    largest = np.abs(values).max(1, keepdims=True) / np.float32(E4M3_MAX)
    scales: NDArray[np.float32] = np.where(np.isfinite(largest), largest, np.float32(np.nan))
    divisor: NDArray[np.float32] = np.where(scales == 0, np.float32(1), scales)
    return ScaledWeight(encode_e4m3(values / divisor), scales, values.shape[1])


def in_mode(part: NDArray[Any] | CodedWeight, mode: str) -> NDArray[Any] | CodedWeight:
    """A weight as a mode has it: as it is in `auto`, float32 in `float`, otherwise in the mode's codes.

    Raises:
        FormatUnsupported: no group of the mode divides its columns.
    """
    if mode in MODE_BITS:
        return as_codes(part, MODE_BITS[mode])
    if mode == FLOAT_MODE:
        return part if isinstance(part, ScaledWeight) else quantize_scaled(as_floats(part))
    return as_floats(part) if mode == "float" else part


def as_floats(part: NDArray[Any] | CodedWeight) -> NDArray[np.float32]:
    """A weight as float32."""
    return part.dequantize() if isinstance(part, CodedWeight) else np.asarray(part, np.float32)


def as_codes(part: NDArray[Any] | CodedWeight, bits: int) -> AffineWeight:
    """A weight in codes of `bits`: as it is where it has them, else rounded in the finest group that fits.

    Raises:
        FormatUnsupported: no group divides its columns.
    """
    if isinstance(part, AffineWeight) and part.bits == bits:
        return part
    values = as_floats(part)
    return quantize_weight(values, bits, finest_group(values.shape[1]))


def finest_group(columns: int) -> int:
    """The group in which floats are rounded. Raises FormatUnsupported where none divides the columns."""
    for group in WEIGHT_GROUPS:
        if columns % group == 0:
            return group
    raise FormatUnsupported(f"{columns} columns: no group of {WEIGHT_GROUPS} divides them; use mode float")
