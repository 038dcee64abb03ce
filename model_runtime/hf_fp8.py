"""8-bit floats in Hugging Face's folders: what config.json says of them, and codes with their scales.

Two forms are published. `fp8` has scales of blocks or of a tensor in `weight_scale_inv`, which codes are
multiplied by, whatever the name says, or in `weight_scale`. `float-quantized` of compressed-tensors has those
of a tensor, of rows, of groups of columns or of blocks in `weight_scale`. Scales of activations are not used.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay.errors import ModelFileInvalid
from kvrelay_kernels.quant import ScaledWeight
from kvrelay_kernels.quant.scales import E4M3_NAN
from model_runtime.fields import Fields
from model_runtime.weights import StoredTensor

DTYPE = "F8_E4M3"
SCALES = ("_scale_inv", "_scale")
"""Behind the name of a tensor of codes: the name of its scales."""
FORMATS = ("float-quantized", "naive-quantized")
"""Of compressed-tensors; the second is the older name."""
STRATEGIES = ("tensor", "channel", "group", "block")

Block = tuple[int, int]
"""Rows and columns of a weight that share a scale."""


def scale_block(config: Mapping[str, Any], source: str) -> Block | None:
    """What config.json says of scales; None: their shapes say all, or there are none.

    Raises:
        ModelFileInvalid: weights are quantized in a way that is not known here.
    """
    outer = Fields(config, f"{source}/config.json")
    inner = outer.inner("text_config")
    settings = (inner if "quantization_config" in inner.values else outer).inner("quantization_config")
    if not settings.values:
        return None
    method, turns = settings.values.get("quant_method"), settings.inner("transform_config")
    if method == "fp8" and settings.get("fmt", str, "e4m3") == "e4m3":
        return _sizes(settings, "weight_block_size")
    if method == "compressed-tensors" and settings.values.get("format") in FORMATS:
        groups = settings.inner("config_groups")
        weights = [groups.inner(name).inner("weights") for name in groups.values]
        weights = [each for each in weights if each.values]
        blocks = {_block_of(each) for each in weights}
        if all(map(_are_floats, weights)) and len(blocks) == 1 and not turns.inner("config_groups").values:
            return blocks.pop()
    raise ModelFileInvalid(
        f"{source}: 'quantization_config' in config.json is not supported; supported: fp8 (e4m3), and "
        f"compressed-tensors' {FORMATS[0]} with all weights alike"
    )


def _are_floats(weights: Fields) -> bool:
    kind = weights.values.get("num_bits"), weights.values.get("type")
    return kind == (8, "float") and weights.values.get("strategy") in STRATEGIES


def _block_of(weights: Fields) -> Block | None:
    """Of a group of compressed-tensors."""
    if weights.values.get("strategy") == "group":
        return 1, weights.get("group_size", int)
    return _sizes(weights, "block_structure")


def _sizes(fields: Fields, key: str) -> Block | None:
    """A block, or None where there is none."""
    if fields.values.get(key) is None:
        return None
    sizes: list[Any] = fields.get(key, list)
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise ModelFileInvalid(f"{fields.source}: {key!r} is {sizes!r:.80}, not rows and columns")
    return sizes[0], sizes[1]


def with_scales(
    name: str, codes: StoredTensor, stored: Mapping[str, StoredTensor], block: Block | None, source: str
) -> StoredTensor:
    """The weight of a tensor of codes, whose scales are among the `stored` tensors.

    Raises:
        ModelFileInvalid: it has no scales, or not in a shape that is known here. Reading it: it or its scales
            hold NaN.
    """
    found = [name + ending for ending in SCALES if name + ending in stored]
    if len(codes.shape) != 2 or not found:
        wanted = " or ".join(repr(name + ending) for ending in SCALES)
        raise ModelFileInvalid(f"{source}: tensor {name!r} is {DTYPE}: not a matrix, or there is no {wanted}")
    scales = stored[found[0]]
    shape, times, group = scales.shape, 1, codes.shape[1]
    rows, columns = codes.shape
    if block is not None and shape == (-(-rows // block[0]), -(-columns // block[1])):
        times, group = block
    elif int(np.prod(shape)) == 1:
        times = rows
    elif shape not in ((rows,), (rows, 1)):
        raise ModelFileInvalid(
            f"{source}: tensor {found[0]!r} has shape {shape}: not that of scales of the whole, of rows or "
            f"of blocks {block} for {name!r} of shape {codes.shape}"
        )

    def read() -> ScaledWeight:
        numbers: NDArray[Any] = np.asarray(codes.read())
        factors = np.asarray(scales.read(), np.float32).reshape(-1, -(-columns // group))
        if bool(((numbers & E4M3_NAN) == E4M3_NAN).any()):
            raise ModelFileInvalid(f"{source}: tensor {name!r} holds NaN")
        if not bool(np.isfinite(factors).all()):
            raise ModelFileInvalid(f"{source}: tensor {found[0]!r} holds NaN or infinity")
        return ScaledWeight(numbers, factors.repeat(times, 0)[:rows], group)

    return StoredTensor(codes.shape, read)
