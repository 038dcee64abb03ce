"""What kernels are told of a cache format and its blocks: macros, the same for readers and writers."""

import numpy as np

from kvrelay_kernels.quant import BlockLayout
from kvrelay_kernels.quant.levels import MAGNITUDES, Levels, magnitudes_of
from kvrelay_kernels.quant.scales import ScaleType

LEVELS: dict[Levels | None, int] = {None: 0, "e4m3": 1, "e2m1": 2, "normal16": 3, "normal8": 3}
"""Places in `Levels` of `levels.cuh`; the codebooks are told apart by their bits."""
SCALES: dict[ScaleType, int] = {"float16": 0, "e8m0": 1, "e4m3": 2}
"""Places in `Scales` of `scales.cuh`."""
SIDES, PARTS = ("k", "v"), ("codes", "scales", "biases")


def format_constants(layout: BlockLayout) -> dict[str, int]:
    """Macros by name: how elements are stored, and where the frames of a block lie in it, in bytes.

    `BITS` is 16 and `GROUP` the head dimension where the cache is not quantized; values take the place of
    codes then. `MAGNITUDES_0` to `_3` hold the table of numbers as float16, two to a word.
    """
    fmt = layout.format
    kind, levels = (fmt.scheme.scales, fmt.scheme.levels) if fmt.quantized else ("float16", None)
    places = {f"{side}_{part}".upper(): 0 for side in SIDES for part in PARTS}
    places |= {frame.name.upper().replace("VALUES", "CODES"): frame.offset for frame in layout.frames}
    return places | _magnitudes(levels) | {
        "HEAD_DIM": layout.head_dim,
        "KV_HEADS": layout.kv_heads,
        "BLOCK_BYTES": layout.block_bytes,
        "BITS": fmt.code_bits or 16,
        "GROUP": fmt.group or layout.head_dim,
        "LEVELS": LEVELS[levels],
        "SCALES": SCALES[kind],
        "ROTATES_VALUES": int(fmt.rotates_values),
    }  # fmt: skip


def _magnitudes(levels: Levels | None) -> dict[str, int]:
    table = np.zeros(8, np.float16)
    if levels in MAGNITUDES:
        numbers = magnitudes_of(levels)
        table[: len(numbers)] = numbers
    return {f"MAGNITUDES_{i}": int(word) for i, word in enumerate(table.view("<u4"))}
