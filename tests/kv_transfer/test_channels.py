"""What every channel has to keep, over each transport."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from kv_transfer.block import BlockCodec
from kv_transfer.channel import Channels
from kv_transfer.embedded import EmbeddedServer
from kvrelay.errors import (
    BadSetup,
    BlockCorrupt,
    BlockMismatch,
    Cancelled,
    KvrelayError,
    LeaseLost,
    TransportLost,
)
from kvrelay.v1.prefill_pb2 import Lease
from tests.kv_transfer.prompts import Prompt, small_codec, until
from tests.kv_transfer.routes import Route, open_route


@pytest.mark.parametrize("tokens", [1, 64, 65, 1000])
def test_the_same_bytes_land(route: Route, tokens: int) -> None:
    prompt = Prompt(route.codec, tokens, seed=tokens)
    arrived = route.landings.expect("a", tokens, prompt.keys, prompt.write)
    sender = route.open("a")
    prompt.send_all(sender)
    handover = sender.commit(tokens, first_token=42).result(20)
    arrival = arrived.result(20)
    assert prompt.landed == prompt.expected
    assert (arrival.tokens, arrival.first_token) == (tokens, 42)
    assert arrival.blocks == handover.blocks == len(prompt.arena)
    assert arrival.bytes == handover.bytes == len(prompt.arena) * route.codec.block_bytes
    assert handover.seconds > 0
    assert len(route.landings) == 0


@pytest.mark.parametrize("transport", ["grpc", "redis", "inproc"])
@pytest.mark.parametrize("name", ["none", "int4-g32"])
def test_every_format_lands(transport: str, name: str, redis_server: EmbeddedServer) -> None:
    # Blocks of 2 MiB: larger than a message is meant to be, and still one message.
    codec = small_codec(name, layers=2, kv_heads=32, head_dim=128)
    with open_route(transport, codec, redis_server) as route:
        prompt = Prompt(codec, 100, seed=5)
        route.hand_over(prompt, "big")
        assert prompt.landed == prompt.expected


def test_leases_at_the_same_time(route: Route) -> None:
    prompts = [Prompt(route.codec, 64 * number + 1, seed=100 + number) for number in range(1, 9)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        runs = [pool.submit(route.hand_over, prompt, f"lease-{i}") for i, prompt in enumerate(prompts)]
        for run in runs:
            run.result(30)
    for prompt in prompts:
        assert prompt.landed == prompt.expected
    assert len(route.landings) == 0


def test_order_and_repetition_do_not_matter(route: Route) -> None:
    prompt = Prompt(route.codec, 300, seed=6)
    arrived = route.landings.expect("a", 300, prompt.keys, prompt.write)
    backwards = list(prompt.blocks())[::-1]
    sender = route.open("a")
    for header, payload in backwards:
        sender.send(header, payload)
    # The commit tells how many blocks the sender sent, so a repeated one is a fault of the sender's.
    sender.commit(300, 1).result(20)
    assert arrived.result(20).blocks == len(backwards)
    assert prompt.landed == prompt.expected


def test_a_missing_block_is_named(route: Route) -> None:
    prompt = Prompt(route.codec, 200, seed=7)
    arrived = route.landings.expect("a", 200, prompt.keys, prompt.write)
    sender = route.open("a")
    for header, payload in prompt.blocks():
        if (header.layer, header.index) != (1, 2):
            sender.send(header, payload)
    sent = sender.commit(200, 1)
    with pytest.raises(BlockCorrupt, match="11 blocks of 200 tokens committed, 12 of 200 expected"):
        arrived.result(20)
    assert isinstance(sent.exception(20), BlockCorrupt | None)
    assert len(route.landings) == 0


def test_blocks_of_another_model_are_refused(route: Route) -> None:
    prompt = Prompt(route.codec, 64, seed=8)
    arrived = route.landings.expect("a", 64, prompt.keys, prompt.write)
    sender = route.open("a")
    for header, payload in prompt.blocks():
        sender.send(replace(header, model=0xBAD), payload)
    sender.commit(64, 1)
    with pytest.raises(BlockMismatch, match="0x0000000000000bad where 0x0000000000c0ffee"):
        arrived.result(20)
    assert prompt.landed == {}


def test_blocks_of_another_prompt_are_refused(route: Route) -> None:
    prompt, other = Prompt(route.codec, 64, seed=9), Prompt(route.codec, 64, seed=10)
    arrived = route.landings.expect("a", 64, prompt.keys, prompt.write)
    sender = route.open("a")
    other.send_all(sender)
    sender.commit(64, 1)
    with pytest.raises(BlockMismatch, match=f"{other.keys[0].hex()}, not {prompt.keys[0].hex()}"):
        arrived.result(20)
    assert prompt.landed == {}


def test_an_abort_fails_the_lease_at_once(route: Route) -> None:
    prompt = Prompt(route.codec, 64 * 40, seed=11)
    arrived = route.landings.expect("a", prompt.tokens, prompt.keys, prompt.write)
    sender = route.open("a")
    prompt.send_all(sender)
    until(lambda: len(prompt.landed) > 0)
    sender.abort()
    with pytest.raises(TransportLost, match="ended before its commit"):
        arrived.result(20)
    with pytest.raises(Cancelled):
        sender.send(*prompt.block(0, 0))
    with pytest.raises(Cancelled):
        sender.commit(prompt.tokens, 1)
    sender.abort()
    assert len(route.landings) == 0


def test_a_closed_lease_takes_nothing_more(route: Route) -> None:
    prompt = Prompt(route.codec, 64 * 40, seed=12)
    arrived = route.landings.expect("a", prompt.tokens, prompt.keys, prompt.write)
    sender = route.open("a")
    for layer, index in list(prompt.arena)[:60]:
        sender.send(*prompt.block(layer, index))
    until(lambda: len(prompt.landed) > 0)
    route.landings.close("a", LeaseLost("the lease a ran out"))
    count = len(prompt.landed)
    with pytest.raises(LeaseLost, match="ran out"):
        arrived.result(20)
    try:
        prompt.send_all(sender)
        error = sender.commit(prompt.tokens, 1).exception(20)
    except KvrelayError as raised:
        error = raised
    assert error is None or isinstance(error, LeaseLost)
    assert len(prompt.landed) == count
    sender.abort()


def test_a_hand_over_after_a_failed_one(route: Route) -> None:
    prompt = Prompt(route.codec, 500, seed=13)
    for attempt in range(3):
        route.landings.expect(f"bad-{attempt}", 500, prompt.keys, prompt.write)
        sender = route.open(f"bad-{attempt}")
        sender.send(*prompt.block(0, 0))
        sender.abort()
    prompt.landed.clear()
    route.hand_over(prompt, "good")
    assert prompt.landed == prompt.expected


def test_a_payload_of_another_size_is_the_callers_fault(route: Route) -> None:
    prompt = Prompt(route.codec, 64, seed=14)
    sender = route.open("a")
    header, payload = prompt.block(0, 0)
    with pytest.raises(ValueError, match="a payload of"):
        sender.send(header, payload[:-1])
    sender.abort()


def test_an_unknown_scheme_is_named(codec: BlockCodec) -> None:
    channels = Channels(codec, {})
    with pytest.raises(BadSetup, match="carrier-pigeon://coop"):
        channels.open(Lease(lease_id="a", endpoint="carrier-pigeon://coop"))
