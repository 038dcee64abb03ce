"""Names and shapes of the cache formats."""

import re
from dataclasses import dataclass
from typing import Literal

from kvrelay_kernels.errors import FormatUnsupported

Element = Literal["float32", "float16", "bfloat16"]
"""Type of an unquantized cache: what the model computes in on its device."""

AFFINE_BITS = {"int8": 8, "int4": 4}
GROUPS = (32, 64)
_NAME = re.compile(r"^(?P<base>[a-z]+\d*)(-g(?P<group>\d+))?$")


@dataclass(frozen=True)
class CacheFormat:
    """How the elements of K and V are stored.

    Affine formats hold `bits`-bit codes with one float16 scale and one float16 bias per `group`
    elements of the head dimension: value = scale * code + bias. Keys are rotated before they are coded, and
    queries with them (`rotation.py`). `none` (bits 0) holds `element`s, as they are.
    """

    base: str
    bits: int
    group: int
    element: Element = "float32"

    @property
    def name(self) -> str:
        """The name that `parse_format` reads, such as `int8-g64` or `none`."""
        return f"{self.base}-g{self.group}" if self.quantized else self.base

    @property
    def quantized(self) -> bool:
        """Whether elements are codes with scales."""
        return self.bits > 0


def parse_format(name: str, head_dim: int, element: Element = "float32") -> CacheFormat:
    """Read `none`, `int8`, `int4` or one with a group such as `int4-g32`.

    Without a group, the largest of 64 and 32 that divides `head_dim` is taken. `element` is the type
    that `none` stores.

    Raises:
        FormatUnsupported: the name is unknown, or the group does not divide `head_dim`.
    """
    match = _NAME.match(name)
    base = match["base"] if match else name
    if base == "none" and match and match["group"] is None:
        return CacheFormat("none", 0, 0, element)
    if match is None or base not in AFFINE_BITS:
        known = ", ".join(["none", *AFFINE_BITS])
        raise FormatUnsupported(f"unknown KV format {name!r}; known: {known}, with -g32 or -g64 behind it")
    fitting = [group for group in GROUPS if head_dim % group == 0]
    group = int(match["group"]) if match["group"] else max(fitting, default=0)
    if group not in fitting:
        raise FormatUnsupported(
            f"KV format {name!r}: no group of {group or GROUPS} divides head dimension {head_dim}"
        )
    return CacheFormat(base, AFFINE_BITS[base], group)
