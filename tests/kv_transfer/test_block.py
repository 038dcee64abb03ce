"""The codec: what is written is read, and nothing else is."""

import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.block import HEADER_BYTES, BlockCodec
from kvrelay.errors import BadBlock, BlockCorrupt, BlockMismatch
from kvrelay_kernels.quant.formats import SCHEMES
from tests.kv_transfer.prompts import Prompt, small_codec

FORMATS = st.sampled_from(["none", "int8-g32", "int4-g64", *SCHEMES])


def tiny() -> BlockCodec:
    """A codec of blocks of 3.3 KB."""
    return small_codec("int4-g32", layers=2, kv_heads=1, head_dim=32)


@given(
    name=FORMATS,
    kv_heads=st.integers(1, 4),
    head_dim=st.sampled_from([64, 128, 256]),
    layer=st.integers(0, 6),
    index=st.integers(0, 1000),
    count=st.integers(1, 64),
    key=st.binary(min_size=16, max_size=16),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_written_is_read(
    name: str, kv_heads: int, head_dim: int, layer: int, index: int, count: int, key: bytes, seed: int
) -> None:
    codec = small_codec(name, 7, kv_heads, head_dim)
    payload = np.random.default_rng(seed).bytes(codec.layout.block_bytes)
    header = codec.header(layer, 64 * index, count, key)
    head, sent = codec.encode(header, memoryview(payload))
    read, landed = codec.decode(head + sent)
    assert len(head) == HEADER_BYTES
    assert replace(read, checksum=0) == header
    assert read.index == index
    for frame in codec.layout.frames:
        before, after = (
            np.frombuffer(octets, np.uint8, frame.nbytes, frame.offset).reshape(kv_heads, 64, -1)
            for octets in (payload, landed)
        )
        assert (after[:, :count] == before[:, :count]).all()
        assert not after[:, count:].any()


def test_a_full_block_is_not_copied() -> None:
    codec = small_codec()
    payload = bytearray(codec.layout.block_bytes)
    head, sent = codec.encode(codec.header(0, 0, 64, bytes(16)), memoryview(payload))
    assert sent.obj is payload
    buffer = head + sent
    assert codec.decode(buffer)[1].obj is buffer


def test_equal_prefixes_give_equal_bytes_whatever_lies_behind_them() -> None:
    codec = small_codec()
    header = codec.header(0, 0, 64, bytes(16))
    one, two = bytearray(codec.layout.block_bytes), bytearray(codec.layout.block_bytes)
    for frame in codec.layout.frames:
        rows = np.frombuffer(two, np.uint8, frame.nbytes, frame.offset).reshape(2, 64, -1)
        rows[:, 10:] = 0xFF
    partly = replace(header, token_count=10)
    assert codec.encode(partly, memoryview(one)) == codec.encode(partly, memoryview(two))
    assert codec.encode(header, memoryview(one)) != codec.encode(header, memoryview(two))


@given(st.integers(1, 255))
def test_any_changed_byte_is_refused(flip: int) -> None:
    codec = tiny()
    block = bytearray(Prompt(codec, 100).message(1, 1))
    for place in range(len(block)):
        block[place] ^= flip
        with pytest.raises(BadBlock):
            codec.decode(bytes(block))
        block[place] ^= flip
    codec.decode(bytes(block))


@given(st.integers(0, 4000))
def test_a_block_cut_short_is_refused(length: int) -> None:
    codec = tiny()
    block = Prompt(codec, 64).message(0, 0)
    with pytest.raises(BlockCorrupt):
        codec.decode(block[: min(length, len(block) - 1)])
    with pytest.raises(BlockCorrupt):
        codec.decode(block + bytes(length + 1))


@given(st.binary(max_size=600))
def test_noise_is_refused(noise: bytes) -> None:
    codec = tiny()
    for buffer in (noise, b"KVRB" + noise, b"KVRB\x01\x00\x80\x00" + noise):
        with pytest.raises(BadBlock):
            codec.decode(buffer)


def test_several_blocks_in_a_message() -> None:
    prompt = Prompt(tiny(), 500)
    message = b"".join(prompt.message(1, index) for index in range(8))
    read = list(prompt.codec.decode_all(message))
    assert [header.index for header, _ in read] == list(range(8))
    with pytest.raises(BlockCorrupt, match="cut short"):
        list(prompt.codec.decode_all(message[:-1]))


def test_mismatches_name_both_values() -> None:
    prompt = Prompt(small_codec(), 64)
    block = prompt.message(0, 0)
    with pytest.raises(BlockMismatch, match="model 0x0000000000c0ffee where 0x0000000000000001"):
        replace(prompt.codec, model=1).decode(block)
    other = small_codec("int4")
    came, agreed = prompt.codec.layout.fingerprint, other.layout.fingerprint
    with pytest.raises(BlockMismatch, match=f"{came:#018x} where {agreed:#018x}"):
        other.decode(block)
    newer = bytearray(block)
    struct.pack_into("<H", newer, 4, 2)
    with pytest.raises(BlockMismatch, match="version 2 where version 1"):
        prompt.codec.decode(bytes(newer))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer": 3}, "layer 3 where the model has 3 layers"),
        ({"token_start": 63}, "64 tokens from 63 on"),
        ({"token_count": 0}, "0 tokens from 0 on"),
        ({"token_count": 65}, "65 tokens from 0 on"),
        ({"group": 32}, "describes itself"),
        ({"frames": (1, 2, 3)}, "describes itself"),
    ],
)
def test_a_sound_block_of_impossible_fields_is_refused(change: dict[str, int], says: str) -> None:
    codec = small_codec()
    header = replace(codec.header(0, 0, 64, bytes(16)), **change)
    with pytest.raises(BlockCorrupt, match=says):
        codec.decode(b"".join(codec.encode(header, memoryview(bytes(codec.layout.block_bytes)))))


def test_the_header_is_as_documented() -> None:
    codec = small_codec()
    header = codec.header(2, 128, 64, bytes(range(16)))
    head, _ = codec.encode(header, memoryview(bytes(codec.layout.block_bytes)))
    assert head[:8] == b"KVRB\x01\x00\x80\x00"
    assert struct.unpack_from("<QQIIII", head, 8) == (
        codec.model,
        codec.layout.fingerprint,
        2,
        128,
        64,
        codec.layout.block_bytes,
    )
    assert struct.unpack_from("<BBHHH", head, 40) == (1, 0, 64, 6, 0)
    assert head[48:64] == bytes(range(16))
    assert struct.unpack_from("<8I", head, 64) == (*(frame.nbytes for frame in codec.layout.frames), 0, 0)
    assert head[104:] == bytes(24)
