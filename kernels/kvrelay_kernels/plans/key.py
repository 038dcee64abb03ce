"""The canonical graph key: what decides a compiled plan, and nothing else.

Two processes that describe the same graph, on machines of one class with the same libraries, get the same
bytes; two graphs that differ in a stride, a type or a mask never do. The bytes are written field by field
(`encoding.py`), so that no padding byte, no order of a dict and no hash seed can enter.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, Protocol, cast, get_args

from kvrelay_kernels.plans.encoding import Value, decode, encode

MAGIC = "kvrelay graph key"
VERSION = 1
"""Of the fields and their order: one more with each change, so that old plans are not mistaken."""

MAX_KEY_BYTES = 16384
"""Longest key. What is larger, such as a source or a tile mask, enters as its digest."""

Causal = Literal["none", "top_left", "bottom_right"]
"""Corner of the score matrix that the diagonal goes through."""

_KIND = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_DIGEST_BYTES = 16


class Strided(Protocol):
    """What NumPy's and CuPy's arrays have in common."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each dimension."""
        ...

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one element to the next."""
        ...

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        ...

    @property
    def dtype(self) -> Any:
        """Type of an element."""
        ...


@dataclass(frozen=True)
class TensorKey:
    """A tensor of a graph."""

    role: str
    """Its name in the graph, such as `q`."""
    element: str
    """Type of its elements, such as `bfloat16`."""
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements, one for each dimension."""

    def __post_init__(self) -> None:
        if len(self.dims) != len(self.strides):
            raise ValueError(f"tensor {self.role}: {len(self.dims)} dims, {len(self.strides)} strides")

    @classmethod
    def of(cls, role: str, array: Strided) -> "TensorKey":
        """The key of an array. Raises ValueError where its strides are no whole elements."""
        if any(stride % array.itemsize for stride in array.strides):
            raise ValueError(f"tensor {role}: strides {array.strides} are no multiples of {array.itemsize}")
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return cls(role, str(array.dtype), tuple(array.shape), strides)


@dataclass(frozen=True)
class MaskKey:
    """Which scores an attention graph masks."""

    causal: Causal = "none"
    window: int | None = None
    """Keys that a query sees, its own included; None: no bound to the left."""
    sinks: int = 0
    """First keys that a window does not hide."""
    padding: bool = False
    """Whether lengths come in as device arrays."""

    def __post_init__(self) -> None:
        if self.causal not in get_args(Causal):
            raise ValueError(f"causal is one of {get_args(Causal)}, not {self.causal!r}")


@dataclass(frozen=True)
class DeviceClass:
    """Machines that share plans."""

    capability: tuple[int, int]
    """Compute capability, such as (9, 0)."""
    processors: int | None = None
    """Multiprocessors, where a plan depends on them; None: it runs on any of this capability."""


@dataclass(frozen=True, eq=False)
class GraphKey:
    """A frozen description of one compiled plan. Keys are equal where their bytes are; `of` makes one.

    Raises:
        TypeError: a field holds a value that has no canonical bytes, such as a NumPy scalar.
        ValueError: the kind is no plain name, names are given twice or out of order, or the key is longer
            than `MAX_KEY_BYTES`.
    """

    kind: str
    """Such as `cudnn.sdpa`, `cubin` or `gemm`: lower-case letters, digits, `.`, `_` and `-`."""
    device: DeviceClass
    tensors: tuple[TensorKey, ...] = ()
    """In the graph's order, which counts."""
    mask: MaskKey = field(default_factory=MaskKey)
    attributes: tuple[tuple[str, Value], ...] = ()
    """By name."""
    libraries: tuple[tuple[str, str], ...] = ()
    """Versions of what builds the plan and of what loads it, by name."""

    @classmethod
    def of(
        cls,
        kind: str,
        device: DeviceClass,
        *,
        tensors: tuple[TensorKey, ...] = (),
        mask: MaskKey | None = None,
        attributes: Mapping[str, Value] | None = None,
        libraries: Mapping[str, str] | None = None,
    ) -> "GraphKey":
        """A key whose attributes and libraries are in their fixed order."""
        return cls(
            kind,
            device,
            tuple(tensors),
            mask or MaskKey(),
            tuple(sorted((attributes or {}).items(), key=_first)),
            tuple(sorted((libraries or {}).items(), key=_first)),
        )

    def __post_init__(self) -> None:
        if not _KIND.fullmatch(self.kind):
            raise ValueError(f"{self.kind!r} is no kind of plan: lower-case letters, digits, '.', '_', '-'")
        _check_ascending("attributes", [name for name, _ in self.attributes])
        _check_ascending("libraries", [name for name, _ in self.libraries])
        roles = [tensor.role for tensor in self.tensors]
        if len(set(roles)) != len(roles):
            raise ValueError(f"tensors: a role is given twice in {roles}")
        if len(self.encoded) > MAX_KEY_BYTES:
            raise ValueError(
                f"a key of {len(self.encoded)} bytes exceeds the {MAX_KEY_BYTES} allowed: put a digest in it"
            )

    @cached_property
    def encoded(self) -> bytes:
        """The canonical bytes."""
        mask = self.mask
        return encode(
            (
                MAGIC,
                VERSION,
                self.kind,
                (self.device.capability, self.device.processors),
                tuple((one.role, one.element, one.dims, one.strides) for one in self.tensors),
                (mask.causal, mask.window, mask.sinks, mask.padding),
                self.attributes,
                self.libraries,
            )
        )

    @cached_property
    def name(self) -> str:
        """Under which stores keep the plan: the kind, and 128 bits of BLAKE2b over the bytes."""
        return f"{self.kind}-{hashlib.blake2b(self.encoded, digest_size=_DIGEST_BYTES).hexdigest()}"

    @classmethod
    def decode(cls, data: bytes) -> "GraphKey":
        """The key of some bytes, so that a stored plan can say what it is.

        Raises:
            ValueError: they are no key, or one of another version.
        """
        fields = decode(data)
        if not isinstance(fields, tuple) or fields[:2] != (MAGIC, VERSION):
            raise ValueError(f"no graph key of version {VERSION}")
        try:
            key = cls._from_fields(fields[2:])
        except (TypeError, AttributeError) as error:
            raise ValueError(f"no graph key: {error}") from error
        if key.encoded != data:
            raise ValueError("no graph key: a field is of the wrong type")
        return key

    @classmethod
    def _from_fields(cls, fields: tuple[Value, ...]) -> "GraphKey":
        # Whatever has the wrong shape or type here fails above, for its bytes come out different.
        kind, device, tensors, mask, attributes, libraries = cast(tuple[Any, ...], fields)
        return cls(
            kind,
            DeviceClass(*device),
            tuple(TensorKey(*one) for one in tensors),
            MaskKey(*mask),
            attributes,
            libraries,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GraphKey) and self.encoded == other.encoded

    def __hash__(self) -> int:
        return hash(self.encoded)

    def __str__(self) -> str:
        return self.name


def _first(item: tuple[str, Any]) -> str:
    return item[0]


def _check_ascending(what: str, names: list[str]) -> None:
    if any(left >= right for left, right in pairwise(names)):
        raise ValueError(f"{what}: names are given twice or out of order in {names}")
