"""Values out of files that anybody may have written, checked as they are taken."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from kvrelay.errors import ModelFileInvalid

LARGEST = 2**63
"""Integers beyond are no sizes, and may not fit a float."""

T = TypeVar("T")


@dataclass(frozen=True)
class Fields:
    """A mapping out of the file `source`."""

    values: Mapping[str, Any]
    source: str

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """A value of exactly type `kind`; integers are taken for floats, and null for the default.

        Raises:
            ModelFileInvalid: it is missing without a default, or of another type.
        """
        value: Any = self.values.get(key)
        value = default if value is None else value
        if kind is float and type(value) is int and abs(value) < LARGEST:
            value = float(value)
        if value is None:
            raise ModelFileInvalid(f"{self.source}: {key!r} is missing")
        if type(value) is not kind or (type(value) is int and abs(value) >= LARGEST):
            raise ModelFileInvalid(f"{self.source}: {key!r} is {value!r:.80}, not {kind.__name__}")
        return value

    def inner(self, key: str) -> "Fields":
        """The mapping below `key`, empty where there is none.

        Raises:
            ModelFileInvalid: it is something else.
        """
        inner: dict[str, Any] = self.get(key, dict, {})
        return Fields(inner, self.source)
