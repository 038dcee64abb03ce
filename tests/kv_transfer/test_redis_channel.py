"""The Redis channel and the block store, with servers that are killed under them."""

import os
import signal
from collections.abc import Iterator

import pytest

from kv_transfer.block import BlockCodec
from kv_transfer.channel import Channels
from kv_transfer.embedded import EmbeddedServer
from kv_transfer.landing import Landings
from kv_transfer.redis_channel import RedisReceiver
from kv_transfer.redis_store import RedisBlockStore, connect
from kv_transfer.transports import default_transports
from kvrelay.errors import BlockCorrupt, TransportLost
from kvrelay.v1.prefill_pb2 import Lease
from tests.kv_transfer.prompts import Prompt, outcome, until
from tests.kv_transfer.routes import Route, open_route


@pytest.fixture
def redis_route(codec: BlockCodec, redis_server: EmbeddedServer) -> Iterator[Route]:
    """A decode worker that receives through an empty Redis server."""
    connect(redis_server.uri).flushall()
    with open_route("redis", codec, redis_server) as route:
        yield route


def block_name(prompt: Prompt, layer: int, index: int) -> str:
    """Where the store keeps a block."""
    return f"kvrelay:block:{prompt.keys[index].hex()}:{layer}"


def test_blocks_that_the_store_has_are_not_sent_again(redis_route: Route) -> None:
    codec = redis_route.codec
    prompt = Prompt(codec, 64 * 5, seed=1)
    redis_route.hand_over(prompt, "a")
    again = Prompt(codec, 64 * 5, seed=1)
    arrived = redis_route.landings.expect("b", again.tokens, again.keys, again.write)
    sender = redis_route.open("b")
    again.send_all(sender)
    handover = sender.commit(again.tokens, 1).result(20)
    assert (handover.blocks, handover.bytes) == (15, 0)
    assert arrived.result(20).bytes == 15 * codec.block_bytes
    assert again.landed == prompt.expected


def test_names_live_for_a_while_only(redis_route: Route, redis_server: EmbeddedServer) -> None:
    prompt = Prompt(redis_route.codec, 64, seed=2)
    redis_route.hand_over(prompt, "a")
    client = connect(redis_server.uri)
    assert 0 < int(str(client.ttl(block_name(prompt, 0, 0)))) <= 3600
    leases = client.keys("kvrelay:inbox:*")
    assert leases == []


def test_a_broken_block_in_the_store_is_refused_and_replaced(
    redis_route: Route, redis_server: EmbeddedServer
) -> None:
    prompt = Prompt(redis_route.codec, 64 * 3, seed=3)
    redis_route.hand_over(prompt, "a")
    connect(redis_server.uri).setrange(block_name(prompt, 1, 1), 500, b"broken")
    arrived = redis_route.landings.expect("b", prompt.tokens, prompt.keys, prompt.write)
    # The server has the commit: only the receiver can tell.
    assert outcome(prompt, redis_route.open("b")) is None
    assert isinstance(arrived.exception(20), BlockCorrupt)
    redis_route.hand_over(prompt, "c")
    assert prompt.landed == prompt.expected


def test_a_block_that_was_evicted_is_named(redis_route: Route, redis_server: EmbeddedServer) -> None:
    prompt = Prompt(redis_route.codec, 64 * 3, seed=4)
    redis_route.hand_over(prompt, "a")
    store = RedisBlockStore(connect(redis_server.uri), prompt.codec)
    connect(redis_server.uri).delete(block_name(prompt, 2, 1))
    wanted = [(prompt.keys[1], 1), (prompt.keys[1], 2)]
    with pytest.raises(BlockCorrupt, match=f"{prompt.keys[1].hex()} of layer 2 is no longer in the store"):
        list(store.fetch(wanted))


def test_the_store_finds_and_gives_leading_blocks(redis_route: Route, redis_server: EmbeddedServer) -> None:
    codec = redis_route.codec
    prompt = Prompt(codec, 64 * 4 + 10, seed=5)
    store = RedisBlockStore(connect(redis_server.uri), codec)
    assert store.find(prompt.keys) == 0
    # A sender without an inbox only stores.
    sender = redis_route.channels.open(Lease(lease_id="store", endpoint=redis_server.uri))
    prompt.send_all(sender)
    sender.commit(prompt.tokens, 1).result(20)
    assert store.find(prompt.keys) == 5
    assert store.find(Prompt(codec, 64 * 4 + 11, seed=5).keys) <= 4
    wanted = [(key, layer) for key in prompt.keys for layer in range(codec.layers)]
    for header, payload in store.fetch(wanted):
        prompt.write(header.layer, header.index, payload)
    assert prompt.landed == prompt.expected
    connect(redis_server.uri).delete(block_name(prompt, 1, 2))
    assert store.find(prompt.keys) == 2
    assert connect(redis_server.uri).keys("kvrelay:inbox:*") == []


def test_a_record_of_noise_is_passed_over(redis_route: Route, redis_server: EmbeddedServer) -> None:
    client = connect(redis_server.uri)
    client.rpush("kvrelay:inbox:decode-0", b"", b"KVRM\xff\xff", b"KVRM\x02\x00\xff\xff", b"KVRC\x01\x00a")
    prompt = Prompt(redis_route.codec, 100, seed=6)
    for record in (b"KVRM\x01\x00b\x00", b"KVRC\x01\x00b\xff\xff\xff", b"KVRZ\x01\x00b"):
        arrived = redis_route.landings.expect("b", prompt.tokens, prompt.keys, prompt.write)
        client.rpush("kvrelay:inbox:decode-0", record)
        assert isinstance(arrived.exception(20), BlockCorrupt)
    redis_route.hand_over(prompt, "c")
    assert prompt.landed == prompt.expected


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_is_killed_in_mid_transfer_and_comes_back(codec: BlockCodec, how: signal.Signals) -> None:
    server = EmbeddedServer()
    landings = Landings(codec)
    receiver = RedisReceiver(server.uri, "decode-0", landings)
    receiver.start()
    channels = Channels(codec, default_transports())
    route = Route(codec, channels, landings, receiver.endpoint)
    store = RedisBlockStore(connect(server.uri), codec)
    prompt = Prompt(codec, 64 * 60, seed=7)
    arrived = landings.expect("a", prompt.tokens, prompt.keys, prompt.write)
    bystander = landings.expect("b", prompt.tokens, prompt.keys, prompt.write)
    sender = route.open("a")
    for layer, index in list(prompt.arena)[:100]:
        sender.send(*prompt.block(layer, index))
    until(lambda: len(prompt.landed) > 0)
    os.kill(server.pid, how)
    assert isinstance(arrived.exception(20), TransportLost)
    assert isinstance(bystander.exception(20), TransportLost)
    until(lambda: not server.running)
    assert isinstance(outcome(prompt, sender), TransportLost)
    assert store.find(prompt.keys) == 0
    assert len(landings) == 0

    again = EmbeddedServer(folder=server.folder)
    prompt.landed.clear()

    def works() -> bool:
        try:
            route.hand_over(prompt, "c")
        except TransportLost:
            landings.close("c")
            return False
        return True

    until(works)
    assert prompt.landed == prompt.expected
    until(lambda: store.find(prompt.keys) == len(prompt.keys))
    channels.close()
    receiver.stop()
    again.stop()
    server.stop()


def test_a_server_that_is_not_there(codec: BlockCodec) -> None:
    uri = "redis+unix:///nowhere/redis.sock"
    with pytest.raises(TransportLost, match="gone or refuses"):
        RedisReceiver(uri, "decode-0", Landings(codec))
    channels = Channels(codec, default_transports())
    sender = channels.open(Lease(lease_id="a", endpoint=f"{uri}?inbox=decode-0"))
    prompt = Prompt(codec, 64)
    prompt.send_all(sender)
    assert isinstance(sender.commit(64, 1).exception(20), TransportLost)
    assert RedisBlockStore(connect(uri), codec).find(prompt.keys) == 0
    channels.close()


def test_leases_are_told_when_the_receiver_stops(codec: BlockCodec, redis_server: EmbeddedServer) -> None:
    landings = Landings(codec)
    receiver = RedisReceiver(redis_server.uri, "decode-9", landings)
    receiver.start()
    prompt = Prompt(codec, 64)
    arrived = landings.expect("a", 64, prompt.keys, prompt.write)
    receiver.stop()
    assert isinstance(arrived.exception(20), TransportLost)
