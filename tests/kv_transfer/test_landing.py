"""Landings: what the decode worker counts and refuses."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.landing import Landings
from kvrelay.errors import BlockCorrupt, Internal, LeaseLost, TransportLost
from kvrelay.v1.transfer_pb2 import Commit
from tests.kv_transfer.prompts import Prompt, small_codec


def commit_of(prompt: Prompt, lease_id: str = "a") -> Commit:
    """The commit that a whole prompt ends with."""
    return Commit(lease_id=lease_id, blocks=len(prompt.arena), tokens=prompt.tokens, first_token=9)


@given(st.data())
def test_any_order_and_repetition_lands(data: st.DataObject) -> None:
    prompt = Prompt(small_codec("int4-g32", 2, 1, 32), data.draw(st.integers(1, 300)))
    landings = Landings(prompt.codec)
    arrived = landings.expect("a", prompt.tokens, prompt.keys, prompt.write)
    places = data.draw(st.permutations(list(prompt.arena)))
    again = data.draw(st.lists(st.sampled_from(places), max_size=5))
    for place in [*again, *places]:
        landings.find("a").land(prompt.message(*place))
    landings.find("a").commit(commit_of(prompt))
    assert arrived.result(0).blocks == len(prompt.arena)
    assert prompt.landed == prompt.expected
    assert len(landings) == 0


@given(st.data())
def test_any_missing_blocks_are_named(data: st.DataObject) -> None:
    prompt = Prompt(small_codec("int4-g32", 2, 1, 32), data.draw(st.integers(1, 300)))
    landings = Landings(prompt.codec)
    arrived = landings.expect("a", prompt.tokens, prompt.keys, prompt.write)
    missing = data.draw(st.sets(st.sampled_from(list(prompt.arena)), min_size=1))
    for place in prompt.arena.keys() - missing:
        landings.find("a").land(prompt.message(*place))
    layer, index = min(missing)
    says = f"{len(missing)} of {len(prompt.arena)} blocks are missing: layer {layer} block {index}"
    with pytest.raises(BlockCorrupt, match=says):
        landings.find("a").commit(commit_of(prompt))
    assert isinstance(arrived.exception(0), BlockCorrupt)
    with pytest.raises(LeaseLost):
        landings.find("a")


def test_the_same_place_with_other_bytes_is_refused() -> None:
    prompt = Prompt(small_codec(), 64)
    other = Prompt(prompt.codec, 64)
    other.arena[0, 0] = np.random.default_rng(99).bytes(prompt.codec.layout.block_bytes)
    landings = Landings(prompt.codec)
    landings.expect("a", 64, prompt.keys, prompt.write)
    landing = landings.find("a")
    landing.land(prompt.message(0, 0))
    with pytest.raises(BlockCorrupt, match="layer 0 block 0 of lease a came twice"):
        landing.land(other.message(0, 0))
    with pytest.raises(BlockCorrupt, match="came twice"):
        landing.land(prompt.message(1, 0))
    assert prompt.landed[0, 0] == prompt.arena[0, 0]


def test_blocks_that_the_sequence_does_not_have_are_refused() -> None:
    short, long = Prompt(small_codec(), 64), Prompt(small_codec(), 128)
    landings = Landings(short.codec)
    landings.expect("a", 64, short.keys, short.write)
    with pytest.raises(BlockCorrupt, match="layer 0 block 1 of lease a: the sequence has 1 blocks"):
        landings.find("a").land(long.message(0, 1))
    landings.expect("b", 63, short.keys, short.write)
    with pytest.raises(BlockCorrupt, match="holds 64 tokens, not 63"):
        landings.find("b").land(short.message(0, 0))


def test_a_commit_of_another_lease_is_refused() -> None:
    prompt = Prompt(small_codec(), 64)
    landings = Landings(prompt.codec)
    landings.expect("a", 64, prompt.keys, prompt.write)
    with pytest.raises(BlockCorrupt, match="a commit of lease b in the hand-over of a"):
        landings.find("a").commit(commit_of(prompt, "b"))


def test_a_write_that_fails_ends_the_lease() -> None:
    def broken(layer: int, index: int, payload: memoryview) -> None:
        raise RuntimeError("the device is gone")

    prompt = Prompt(small_codec(), 64)
    landings = Landings(prompt.codec)
    arrived = landings.expect("a", 64, prompt.keys, broken)
    with pytest.raises(Internal, match="layer 0 block 0 of lease a could not be written: the device is gone"):
        landings.find("a").land(prompt.message(0, 0))
    assert isinstance(arrived.exception(0), Internal)


def test_close_waits_for_a_write_that_is_under_way() -> None:
    writing, go_on, written = threading.Event(), threading.Event(), threading.Event()

    def slow(layer: int, index: int, payload: memoryview) -> None:
        writing.set()
        go_on.wait(20)
        written.set()

    prompt = Prompt(small_codec(), 64)
    landings = Landings(prompt.codec)
    arrived = landings.expect("a", 64, prompt.keys, slow)
    landing = landings.find("a")
    receiver = threading.Thread(target=landing.land, args=(prompt.message(0, 0),))
    receiver.start()
    writing.wait(20)
    closer = threading.Thread(target=landings.close, args=("a",))
    closer.start()
    assert not arrived.done()
    go_on.set()
    closer.join(20)
    assert written.is_set()
    assert isinstance(arrived.exception(20), LeaseLost)
    receiver.join(20)
    with pytest.raises(LeaseLost):
        landing.land(prompt.message(1, 0))


def test_the_table_of_leases() -> None:
    prompt = Prompt(small_codec(), 64)
    landings = Landings(prompt.codec)
    first = landings.expect("a", 64, prompt.keys, prompt.write)
    second = landings.expect("b", 64, prompt.keys, prompt.write)
    with pytest.raises(ValueError, match="expected already"):
        landings.expect("a", 64, prompt.keys, prompt.write)
    with pytest.raises(ValueError, match="1 keys for 65 tokens"):
        landings.expect("c", 65, prompt.keys, prompt.write)
    assert not first.cancel()
    landings.fail_all(TransportLost("gone"))
    landings.close("a")
    assert isinstance(first.exception(0), TransportLost)
    assert isinstance(second.exception(0), TransportLost)
    assert len(landings) == 0
    landings.expect("a", 64, prompt.keys, prompt.write)
