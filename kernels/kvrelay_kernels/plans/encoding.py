"""Values as bytes: tagged, with explicit lengths, and one form only for each value.

A value is `tag (1 byte) | length of the payload (4 bytes, big-endian) | payload`; the payload of a tuple is
its values, one behind the other. No two values share their bytes: not `1`, `1.0` and `True`, not `("ab",)`
and `("a", "b")`. Nothing depends on the process: no hash, no memory layout, no order of a dict.
"""

import math
import struct
from collections.abc import Iterator
from typing import TypeAlias

Value: TypeAlias = "bool | int | float | str | bytes | tuple[Value, ...] | None"

_HEAD = struct.Struct(">cI")
_REAL = struct.Struct(">d")
MAX_DEPTH = 16
"""Tuples inside each other, at most."""


def encode(value: Value) -> bytes:
    """The bytes of a value.

    Raises:
        TypeError: it is of another type, a subclass such as `numpy.float64` or an enum included.
        ValueError: it is NaN, text with half a surrogate pair, or nested too deeply.
    """
    return _encode(value, 0)


def decode(data: bytes) -> Value:
    """The value of some bytes.

    Raises:
        ValueError: `encode` makes no such bytes.
    """
    values = tuple(_values(data, 0))
    if len(values) != 1:
        raise ValueError(f"{len(values)} values where there should be one")
    return values[0]


def _encode(value: Value, depth: int) -> bytes:
    tag, payload = _parts(value, depth)
    return _HEAD.pack(tag, len(payload)) + payload


def _parts(value: Value, depth: int) -> tuple[bytes, bytes]:
    kind = type(value)
    if value is None:
        return b"n", b""
    if value is True or value is False:
        return b"t" if value else b"f", b""
    if isinstance(value, int) and kind is int:
        return b"i", value.to_bytes(_integer_bytes(value), "big", signed=True)
    if isinstance(value, float) and kind is float:
        if math.isnan(value):
            raise ValueError("NaN equals nothing, itself included: it cannot be part of a key")
        return b"d", _REAL.pack(value)
    if isinstance(value, str) and kind is str:
        return b"s", value.encode()
    if isinstance(value, bytes) and kind is bytes:
        return b"b", value
    if isinstance(value, tuple) and kind is tuple:
        if depth == MAX_DEPTH:
            raise ValueError("nested too deeply")
        return b"(", b"".join(_encode(item, depth + 1) for item in value)
    raise TypeError(f"{kind.__name__} has no canonical bytes")


def _values(data: bytes, depth: int) -> Iterator[Value]:
    place = 0
    while place < len(data):
        if len(data) - place < _HEAD.size:
            raise ValueError("cut short")
        tag, length = _HEAD.unpack_from(data, place)
        place += _HEAD.size
        payload = data[place : place + length]
        if len(payload) != length:
            raise ValueError("cut short")
        place += length
        yield _value(tag, payload, depth)


def _value(tag: bytes, payload: bytes, depth: int) -> Value:
    value: Value
    match tag:
        case b"n" | b"f" | b"t":
            value = {b"n": None, b"f": False, b"t": True}[tag]
        case b"i":
            value = int.from_bytes(payload, "big", signed=True)
        case b"d" if len(payload) == _REAL.size:
            (value,) = _REAL.unpack(payload)
        case b"s":
            value = payload.decode()
        case b"b":
            value = payload
        case b"(" if depth < MAX_DEPTH:
            return tuple(_values(payload, depth + 1))
        case _:
            raise ValueError(f"no value has the tag {tag!r} and {len(payload)} bytes")
    if _parts(value, depth)[1] != payload:
        raise ValueError("not the canonical form of its value")
    return value


def _integer_bytes(value: int) -> int:
    # One bit more than the number's own, for the sign.
    return (value if value >= 0 else ~value).bit_length() // 8 + 1
