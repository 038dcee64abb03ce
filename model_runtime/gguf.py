"""Reader of GGUF files, memory-mapped; every length in one is checked before it is used.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvrelay.errors import ModelFileInvalid
from kvrelay_kernels.interface import HostWeight
from kvrelay_kernels.quant import AffineWeight
from model_runtime.fields import Fields
from model_runtime.gguf_blocks import BLOCK_TYPES, BlockType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY, BOOL = 8, 9, 7
SCALARS: Mapping[int, tuple[str, type[np.generic]]] = {
    0: ("B", np.uint8),
    1: ("b", np.int8),
    2: ("H", np.uint16),
    3: ("h", np.int16),
    4: ("I", np.uint32),
    5: ("i", np.int32),
    6: ("f", np.float32),
    7: ("?", np.bool_),
    10: ("Q", np.uint64),
    11: ("q", np.int64),
    12: ("d", np.float64),
}
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16

T = TypeVar("T")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies; `shape` is in NumPy's order (rows, columns), the reverse of the file's."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


class GgufFile:
    """An open GGUF file. Tensors are unpacked one by one as they are read.

    Raises:
        ModelFileInvalid: the file is not GGUF, is broken or truncated; the message says what and where.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = _map(path)
        reader = _Reader(self._bytes, path)
        count = reader.header()
        self.metadata: dict[str, Any] = reader.metadata(count[1])
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment % 8:
            raise ModelFileInvalid(f"{path.name}: general.alignment is {alignment!r}")
        self.tensors: dict[str, TensorInfo] = reader.tensors(count[0], alignment)

    def read(self, name: str) -> HostWeight:
        """Unpack a tensor: float types as they are, block types as an AffineWeight, without loss.

        Raises:
            ModelFileInvalid: there is no such tensor, or its scales are not finite.
        """
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileInvalid(f"{self.path.name}: tensor {name!r} is missing")
        raw = np.frombuffer(self._bytes, np.uint8, info.nbytes, info.offset)
        with np.errstate(invalid="ignore", over="ignore"):
            weight = info.type.unpack(raw, info.shape)
        if isinstance(weight, AffineWeight) and not (
            np.isfinite(weight.scales).all() and np.isfinite(weight.biases).all()
        ):
            raise ModelFileInvalid(f"{self.path.name}: tensor {name!r} has scales that are NaN or infinite")
        return weight

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """A metadata value, checked as `Fields.get` does."""
        return Fields(self.metadata, self.path.name).get(key, kind, default)

    def strings(self, key: str) -> list[str]:
        """A metadata array of strings.

        Raises:
            ModelFileInvalid: it is missing, of another type, or not UTF-8.
        """
        value = self.metadata.get(key)
        if not isinstance(value, StringArray):
            raise ModelFileInvalid(f"{self.path.name}: metadata {key!r} is not an array of strings")
        return value.decode()


@dataclass(frozen=True)
class StringArray:
    """An array of strings, left in the file until it is wanted: vocabularies are long."""

    source: str
    buffer: memoryview
    spans: list[tuple[int, int]]

    def decode(self) -> list[str]:
        """All strings.

        Raises:
            ModelFileInvalid: one is not UTF-8.
        """
        return [self[index] for index in range(len(self.spans))]

    def __getitem__(self, index: int) -> str:
        """One string.

        Raises:
            ModelFileInvalid: it is not UTF-8.
        """
        start, end = self.spans[index]
        try:
            return str(self.buffer[start:end], "utf-8")
        except UnicodeDecodeError as error:
            raise ModelFileInvalid(f"{self.source}: string {index} of an array is not UTF-8") from error


class _Reader:
    """Walks the file from its start; nothing is read that was not checked to lie within."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self.data = data
        self.name = path.name
        self.at = 0

    def take(self, size: int, what: str) -> int:
        """Step over `size` bytes and return where they began."""
        start = self.at
        if size > len(self.data) - start:
            raise ModelFileInvalid(
                f"{self.name}: truncated: {what} at byte {start} wants {size} bytes, "
                f"{len(self.data) - start} are left"
            )
        self.at = start + size
        return start

    def scalar(self, code: str, what: str) -> Any:
        """One little-endian number."""
        size = struct.calcsize(f"<{code}")
        return struct.unpack_from(f"<{code}", self.data, self.take(size, what))[0]

    def string(self, what: str) -> str:
        """One string behind its 64-bit length."""
        size = self.scalar("Q", f"length of {what}")
        start = self.take(size, what)
        try:
            return str(self.data[start : start + size], "utf-8")
        except UnicodeDecodeError as error:
            raise ModelFileInvalid(f"{self.name}: {what} at byte {start} is not UTF-8") from error

    def header(self) -> tuple[int, int]:
        """The numbers of tensors and of metadata entries."""
        if bytes(self.data[:4]) != MAGIC:
            raise ModelFileInvalid(f"{self.name} is not a GGUF file: it begins with {bytes(self.data[:4])!r}")
        self.at = 4
        version = self.scalar("I", "version")
        if version not in VERSIONS:
            raise ModelFileInvalid(f"{self.name}: GGUF version {version} is not supported (2 and 3 are)")
        return self.scalar("Q", "tensor count"), self.scalar("Q", "metadata count")

    def metadata(self, count: int) -> dict[str, Any]:
        """All metadata entries."""
        entries: dict[str, Any] = {}
        for _ in range(count):
            key = self.string("metadata key")
            if key in entries:
                raise ModelFileInvalid(f"{self.name}: metadata {key!r:.80} occurs twice")
            kind = self.scalar("I", f"type of {key!r:.80}")
            entries[key] = self.value(kind, f"value of {key!r:.80}")
        return entries

    def value(self, kind: int, what: str) -> Any:
        """One metadata value."""
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in SCALARS:
            raise ModelFileInvalid(f"{self.name}: {what} has unknown type {kind}")
        return self.scalar(SCALARS[kind][0], what)

    def array(self, what: str) -> NDArray[Any] | StringArray:
        """One array of numbers or strings."""
        kind, count = self.scalar("I", what), self.scalar("Q", what)
        if kind == STRING:
            return self.string_array(count, what)
        if kind not in SCALARS:
            raise ModelFileInvalid(f"{self.name}: {what} is an array of unsupported type {kind}")
        dtype = np.dtype(SCALARS[kind][1])
        start = self.take(count * dtype.itemsize, what)
        return np.frombuffer(self.data, dtype, count, start).copy()

    def string_array(self, count: int, what: str) -> StringArray:
        """Where each string of an array lies."""
        # Each string has at least its length: a wild count fails here and not in a loop over it.
        if count * 8 > len(self.data) - self.at:
            self.take(count * 8, what)
        unpack, data, at, size = struct.Struct("<Q").unpack_from, self.data, self.at, len(self.data)
        spans: list[tuple[int, int]] = []
        for _ in range(count):
            if at + 8 > size:
                break
            start = at + 8
            at = start + unpack(data, at)[0]
            spans.append((start, at))
        if len(spans) < count or at > size:
            raise ModelFileInvalid(f"{self.name}: truncated: {what} runs past the end of the file")
        self.at = at
        return StringArray(self.name, data, spans)

    def tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        """All tensor infos, their offsets made absolute and their extents checked."""
        found: list[tuple[str, tuple[int, ...], BlockType, int]] = []
        for _ in range(count):
            name = self.string("tensor name")
            dimensions = self.scalar("I", f"dimensions of {name!r:.80}")
            if not 0 < dimensions <= MAX_DIMENSIONS:
                raise ModelFileInvalid(f"{self.name}: tensor {name!r:.80} has {dimensions} dimensions")
            shape = tuple(self.scalar("Q", f"shape of {name!r:.80}") for _ in range(dimensions))[::-1]
            kind = self.scalar("I", f"type of {name!r:.80}")
            offset = self.scalar("Q", f"offset of {name!r:.80}")
            if kind not in BLOCK_TYPES:
                known = ", ".join(known.name for known in BLOCK_TYPES.values())
                raise ModelFileInvalid(
                    f"{self.name}: tensor {name!r:.80} has type {kind}; supported: {known}"
                )
            found.append((name, shape, BLOCK_TYPES[kind], offset))
        base = -(-self.at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, block, offset in found:
            size, start = self.extent(name, shape, block), base + offset
            if offset % alignment or start + size > len(self.data):
                raise ModelFileInvalid(
                    f"{self.name}: truncated: tensor {name!r:.80} wants bytes {start} to {start + size}, "
                    f"the file has {len(self.data)}"
                )
            if name in tensors:
                raise ModelFileInvalid(f"{self.name}: tensor {name!r:.80} occurs twice")
            tensors[name] = TensorInfo(name, shape, block, start, size)
        return tensors

    def extent(self, name: str, shape: tuple[int, ...], block: BlockType) -> int:
        """Bytes of a tensor."""
        elements = 1
        for length in shape:
            elements *= length
        if elements == 0 or shape[-1] % block.elements:
            raise ModelFileInvalid(
                f"{self.name}: tensor {name!r:.80} of {block.name} cannot have shape {shape}"
            )
        return elements // block.elements * block.nbytes


def _map(path: Path) -> memoryview:
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError as error:
        raise ModelFileInvalid(f"{path.name} is empty") from error
    except OSError as error:
        raise ModelFileInvalid(f"{path} cannot be read: {error.strerror}") from error
