"""Cache formats, block layout, and weights in codes: bytes that every backend reads alike."""

from kvrelay_kernels.quant.formats import CacheFormat, parse_format
from kvrelay_kernels.quant.layout import BLOCK_TOKENS, BlockLayout, Frame
from kvrelay_kernels.quant.weights import AffineWeight, CodedWeight, ScaledWeight

__all__ = [
    "BLOCK_TOKENS",
    "AffineWeight",
    "BlockLayout",
    "CacheFormat",
    "CodedWeight",
    "Frame",
    "ScaledWeight",
    "parse_format",
]
