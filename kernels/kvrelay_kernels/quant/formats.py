"""Names and shapes of the cache formats."""

import re
from dataclasses import dataclass
from typing import Literal

from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.quant.levels import Levels
from kvrelay_kernels.quant.rotation import run_length
from kvrelay_kernels.quant.scales import ScaleType

Element = Literal["float32", "float16", "bfloat16"]
"""Type of an unquantized cache: what the model computes in on its device."""

_NAME = re.compile(r"^(?P<base>[a-z]+\d*)(-g(?P<group>\d+))?$")
SMALLEST_RUN = 32
"""Elements that are rotated together must be many, for their values to be spread as a normal's are."""


@dataclass(frozen=True)
class Scheme:
    """What all caches of one name have in common.

    `bits` of a code; the `groups` to choose from, or None: a group is the run that is rotated together;
    what codes stand for: numbers for `levels`, or steps above a float16 bias where these are None.
    """

    bits: int
    groups: tuple[int, ...] | None
    scales: ScaleType
    levels: Levels | None = None


SCHEMES = {
    "int8": Scheme(8, (64, 32), "float16"),
    "int6": Scheme(6, (64, 32), "float16"),
    "int4": Scheme(4, (64, 32), "float16"),
    "mxfp8": Scheme(8, (32,), "e8m0", "e4m3"),
    "mxfp4": Scheme(4, (32,), "e8m0", "e2m1"),
    "nvfp4": Scheme(4, (16,), "e4m3", "e2m1"),
    "turbo4": Scheme(4, None, "float16", "normal16"),
    "turbo3": Scheme(3, None, "float16", "normal8"),
}
KNOWN = ("none", *SCHEMES)
"""What `parse_format` reads; behind an `int`, `-g32` or `-g64` may follow."""


@dataclass(frozen=True)
class CacheFormat:
    """How the elements of K and V are stored.

    Quantized formats hold `code_bits`-bit codes, and a scale per `group` elements of the head dimension:
    value = scale * code + bias (affine: int8, int6, int4), or scale * the number that the code stands for
    (mxfp8, mxfp4, nvfp4; turbo4 and turbo3, where these are the codebook of a normal distribution). Keys are
    rotated before they are coded, and queries with them (`rotation.py`); in turbo formats values, too.
    `none` (0 bits) holds `element`s, as they are.
    """

    base: str
    code_bits: int
    group: int
    element: Element = "float32"

    @property
    def name(self) -> str:
        """The name that `parse_format` reads, such as `int8-g64`, `nvfp4` or `none`."""
        groups = self.scheme.groups if self.quantized else None
        return f"{self.base}-g{self.group}" if groups and len(groups) > 1 else self.base

    @property
    def quantized(self) -> bool:
        """Whether elements are codes with scales."""
        return self.code_bits > 0

    @property
    def scheme(self) -> Scheme:
        """What goes with the name; KeyError for `none`."""
        return SCHEMES[self.base]

    @property
    def affine(self) -> bool:
        """Whether codes are steps above a bias."""
        return self.quantized and self.scheme.levels is None

    @property
    def rotates_values(self) -> bool:
        """Whether V is rotated, too: attention's result is then, and must be rotated back."""
        return self.quantized and self.scheme.groups is None

    @property
    def parts(self) -> dict[str, str]:
        """Names and types of the arrays that K or V is stored as, in their order."""
        if not self.quantized:
            return {"values": self.element}
        scales = "float16" if self.scheme.scales == "float16" else "uint8"
        return {"codes": "uint32", "scales": scales} | ({"biases": scales} if self.affine else {})


def parse_format(name: str, head_dim: int, element: Element = "float32") -> CacheFormat:
    """Read one of `KNOWN`, or one with a group such as `int4-g32`.

    Without a group, the largest that its scheme allows and that divides `head_dim` is taken. `element` is the
    type that `none` stores.

    Raises:
        FormatUnsupported: the name is unknown, or the group does not divide `head_dim`.
    """
    match = _NAME.match(name)
    base = match["base"] if match else name
    if base == "none" and match and match["group"] is None:
        return CacheFormat("none", 0, 0, element)
    if match is None or base not in SCHEMES:
        raise FormatUnsupported(
            f"unknown KV format {name!r}; known: {', '.join(KNOWN)}, ints with -g32 or -g64 behind them"
        )
    scheme = SCHEMES[base]
    run = run_length(head_dim)
    groups = scheme.groups or ((run,) if run >= SMALLEST_RUN else ())
    fitting = [group for group in groups if head_dim % group == 0]
    group = int(match["group"]) if match["group"] else max(fitting, default=0)
    if group not in fitting:
        wanted = group or scheme.groups or f"a power of two from {SMALLEST_RUN} up"
        raise FormatUnsupported(f"KV format {name!r}: no group of {wanted} divides head dimension {head_dim}")
    return CacheFormat(base, scheme.bits, group)
