"""The codec of one KV block: a fixed header, then the bytes that lie in the arena."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash

from kvrelay.errors import BlockCorrupt, BlockMismatch
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout

MAGIC = b"KVRB"
VERSION = 1
HEADER_BYTES = 128
KEY_BYTES = 16
MAX_FRAMES = 8

FORMAT_CODES = {
    "none": 0,
    "int8": 1,
    "int6": 2,
    "int4": 3,
    "mxfp8": 4,
    "mxfp4": 5,
    "nvfp4": 6,
    "turbo4": 7,
    "turbo3": 8,
}
ELEMENT_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}

_PREFIX = struct.Struct("<4sHH")
_HEADER = struct.Struct("<4sHHQQIIIIBBHHH16s8IQ24x")
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_AT = 96


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What stands before a block's payload.

    On the wire, little-endian, at byte: 0 magic `KVRB`, 4 version u16, 6 header bytes u16, 8 model u64,
    16 layout u64, 24 layer u32, 28 token_start u32, 32 token_count u32, 36 payload bytes u32, 40 format
    u8, 41 element u8, 42 group u16, 44 frame count u16, 46 zero u16, 48 key 16 bytes, 64 frame bytes
    8 x u32 (unused ones zero), 96 checksum u64, 104 zeros up to 128. The checksum is xxh3-64 of the header
    with a checksum of zero, followed by the payload.
    """

    model: int
    """Fingerprint of the model that computed the block."""
    layout: int
    """`BlockLayout.fingerprint`."""
    layer: int
    token_start: int
    """Position of the block's first token; a multiple of 64."""
    token_count: int
    """Tokens in the block, 1 to 64. Rows behind them are zero on the wire."""
    key: bytes
    """Prefix key of the tokens up to the block's end (`kv_transfer.prefix`), 16 bytes."""
    format: int
    element: int
    group: int
    frames: tuple[int, ...]
    """Bytes of each frame, without the padding behind it."""
    payload_bytes: int
    checksum: int = 0
    """As it came off the wire; `encode` computes its own."""

    @property
    def index(self) -> int:
        """Which block of its sequence it is, from 0."""
        return self.token_start // BLOCK_TOKENS


@dataclass(frozen=True)
class BlockCodec:
    """Writes and reads the blocks of one cache: both pools agree on a model, a layout and the layers.

    A payload is a block exactly as it lies in an arena, with one exception: rows behind `token_count`
    are whatever the arena held, maybe another request's, so `encode` sends zeros there. Equal prefixes
    therefore give equal bytes, and nothing of another request leaves its arena. Only a partly filled block
    is copied for that; a full one is never touched.
    """

    model: int
    layout: BlockLayout
    layers: int

    @property
    def block_bytes(self) -> int:
        """Bytes of a block on the wire, header included."""
        return HEADER_BYTES + self.layout.block_bytes

    @cached_property
    def _agreed(self) -> tuple[int, int, int, tuple[int, ...], int]:
        fmt = self.layout.format
        lengths = tuple(frame.nbytes for frame in self.layout.frames)
        return FORMAT_CODES[fmt.base], ELEMENT_CODES[fmt.element], fmt.group, lengths, self.layout.block_bytes

    def header(self, layer: int, token_start: int, token_count: int, key: bytes) -> BlockHeader:
        """The header of a block of this cache."""
        fingerprints = self.model, self.layout.fingerprint
        return BlockHeader(*fingerprints, layer, token_start, token_count, key, *self._agreed)

    def encode(self, header: BlockHeader, payload: memoryview) -> tuple[bytes, memoryview]:
        """Header bytes and payload; the payload is the given view unless its last rows have to be zeroed.

        Raises:
            ValueError: the payload is not one block of the layout.
        """
        if payload.nbytes != header.payload_bytes or payload.nbytes != self.layout.block_bytes:
            raise ValueError(f"a payload of {payload.nbytes} bytes, not {self.layout.block_bytes}")
        if header.token_count < BLOCK_TOKENS:
            payload = self._without_tail(payload, header.token_count)
        head = bytearray(
            _HEADER.pack(
                MAGIC,
                VERSION,
                HEADER_BYTES,
                header.model,
                header.layout,
                header.layer,
                header.token_start,
                header.token_count,
                header.payload_bytes,
                header.format,
                header.element,
                header.group,
                len(header.frames),
                0,
                header.key,
                *header.frames,
                *(0,) * (MAX_FRAMES - len(header.frames)),
                0,
            )
        )
        _CHECKSUM.pack_into(head, _CHECKSUM_AT, _checksum(head, payload))
        return bytes(head), payload

    def decode(self, buffer: bytes | memoryview) -> tuple[BlockHeader, memoryview]:
        """The one block in `buffer`; its payload is a view.

        Raises:
            BlockCorrupt: magic, length, checksum or a field's range is wrong.
            BlockMismatch: a sound block of another version, model or layout.
        """
        view = memoryview(buffer)
        header, payload = self._decode_first(view)
        if len(view) != HEADER_BYTES + payload.nbytes:
            raise BlockCorrupt(f"{len(view)} bytes where a block has {HEADER_BYTES + payload.nbytes}")
        return header, payload

    def decode_all(self, message: bytes | memoryview) -> Iterator[tuple[BlockHeader, memoryview]]:
        """The whole blocks that lie one behind the other in `message`; raises as `decode` does."""
        view = memoryview(message)
        while view.nbytes:
            header, payload = self._decode_first(view)
            yield header, payload
            view = view[HEADER_BYTES + payload.nbytes :]

    def _decode_first(self, view: memoryview) -> tuple[BlockHeader, memoryview]:
        if len(view) < HEADER_BYTES:
            raise BlockCorrupt(f"{len(view)} bytes where a block's header has {HEADER_BYTES}")
        magic, version, header_bytes = _PREFIX.unpack_from(view)
        if magic != MAGIC:
            raise BlockCorrupt(f"a block begins with {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            raise BlockMismatch(f"a block of version {version} where version {VERSION} is read")
        if header_bytes != HEADER_BYTES:
            raise BlockCorrupt(f"a header of {header_bytes} bytes where version {VERSION} has {HEADER_BYTES}")
        fields = _HEADER.unpack_from(view)
        model, layout, layer, token_start, token_count, payload_bytes, fmt, element, group = fields[3:12]
        key, frames, checksum = fields[14], fields[15 : 15 + fields[12]], fields[23]
        payload = view[HEADER_BYTES : HEADER_BYTES + payload_bytes]
        if payload.nbytes != payload_bytes:
            raise BlockCorrupt(f"a block cut short: {payload.nbytes} of {payload_bytes} payload bytes")
        head = bytearray(view[:HEADER_BYTES])
        _CHECKSUM.pack_into(head, _CHECKSUM_AT, 0)
        found = _checksum(head, payload)
        if found != checksum:
            raise BlockCorrupt(f"a block's checksum is {found:#018x}, its header says {checksum:#018x}")
        described = fmt, element, group, frames, payload_bytes
        header = BlockHeader(model, layout, layer, token_start, token_count, key, *described, checksum)
        self._check(header)
        return header, payload

    def _check(self, header: BlockHeader) -> None:
        if header.model != self.model:
            raise BlockMismatch(f"a block of model {header.model:#018x} where {self.model:#018x} is served")
        agreed = self.layout.fingerprint
        if header.layout != agreed:
            raise BlockMismatch(f"a block of layout {header.layout:#018x} where {agreed:#018x} is agreed")
        described = (header.format, header.element, header.group, header.frames, header.payload_bytes)
        if described != self._agreed:
            raise BlockCorrupt(f"a block describes itself as {described} where its layout is {self._agreed}")
        if header.layer >= self.layers:
            raise BlockCorrupt(f"a block of layer {header.layer} where the model has {self.layers} layers")
        if header.token_start % BLOCK_TOKENS or not 0 < header.token_count <= BLOCK_TOKENS:
            raise BlockCorrupt(f"a block of {header.token_count} tokens from {header.token_start} on")

    def _without_tail(self, payload: memoryview, token_count: int) -> memoryview:
        copy = bytearray(payload)
        octets = np.frombuffer(copy, np.uint8)
        for frame in self.layout.frames:
            rows = octets[frame.offset : frame.offset + frame.nbytes].reshape(
                frame.shape[0], BLOCK_TOKENS, -1
            )
            rows[:, token_count:] = 0
        return memoryview(copy)


def _checksum(head: bytearray, payload: memoryview) -> int:
    state = xxhash.xxh3_64(head)
    state.update(payload)
    return state.intdigest()
