"""Cache formats, block layout, and weights in affine form: bytes that every backend reads alike."""

from kvrelay_kernels.quant.formats import CacheFormat, parse_format
from kvrelay_kernels.quant.layout import BLOCK_TOKENS, BlockLayout, Frame
from kvrelay_kernels.quant.weights import AffineWeight

__all__ = ["BLOCK_TOKENS", "AffineWeight", "BlockLayout", "CacheFormat", "Frame", "parse_format"]
