"""What can go wrong between two workers over gRPC, and what each side is told."""

import socket
import threading
from collections.abc import Iterator
from time import perf_counter
from typing import cast

import grpc
import pytest

from kv_transfer.block import BlockCodec
from kv_transfer.channel import Channels
from kv_transfer.grpc_channel import COMMIT_MAGIC, LEASE_KEY, PATH
from kv_transfer.landing import Landings
from kv_transfer.transports import default_transports
from kvrelay.errors import BlockCorrupt, Cancelled, KvrelayError, LeaseLost, TransportLost, error_of_status
from kvrelay.v1.transfer_pb2 import Commit
from tests.kv_transfer.prompts import Prompt, outcome, small_codec, until
from tests.kv_transfer.routes import Route, TransferServer


@pytest.fixture
def grpc_route(codec: BlockCodec) -> Iterator[Route]:
    """A decode worker that receives over gRPC, with a server that a test may end."""
    landings = Landings(codec)
    server = TransferServer(landings)
    channels = Channels(codec, default_transports())
    yield Route(codec, channels, landings, f"grpc://127.0.0.1:{server.port}")
    channels.close()
    server.stop()


def push(route: Route, lease_id: str, *messages: bytes) -> KvrelayError | None:
    """Send raw messages as a faulty peer would; returns what the server answers."""
    with grpc.insecure_channel(route.endpoint.removeprefix("grpc://")) as channel:
        try:
            channel.stream_unary(PATH)(iter(messages), metadata=((LEASE_KEY, lease_id),), timeout=20)
        except grpc.RpcError as error:
            call = cast(grpc.Call, error)
            trailing = [(key, value) for key, value in call.trailing_metadata() or ()]
            return error_of_status(call.code(), call.details(), trailing)
    return None


def commit_of(prompt: Prompt) -> bytes:
    """The message that ends a hand-over."""
    commit = Commit(lease_id="a", blocks=len(prompt.arena), tokens=prompt.tokens, first_token=1)
    return COMMIT_MAGIC + commit.SerializeToString()


def test_an_unknown_lease_is_refused(grpc_route: Route) -> None:
    prompt = Prompt(grpc_route.codec, 64 * 40)
    error = outcome(prompt, grpc_route.open("nobody's"))
    assert isinstance(error, LeaseLost)
    assert "nobody's" in str(error)


@pytest.mark.parametrize("damage", ["flip", "truncate", "noise", "no commit", "bad commit", "missing"])
def test_a_faulty_stream_fails_the_lease_on_both_sides(grpc_route: Route, damage: str) -> None:
    prompt = Prompt(grpc_route.codec, 64 * 4)
    messages = [prompt.message(*place) for place in prompt.arena]
    messages.append(commit_of(prompt))
    if damage == "flip":
        messages[5] = messages[5][:1000] + bytes([messages[5][1000] ^ 4]) + messages[5][1001:]
    elif damage == "truncate":
        messages[5] = messages[5][:-64]
    elif damage == "noise":
        messages[5] = b"\x00" * 500
    elif damage == "no commit":
        messages.pop()
    elif damage == "bad commit":
        messages[-1] = COMMIT_MAGIC + b"\xff\xff\xff"
    else:
        del messages[7]
    arrived = grpc_route.landings.expect("a", prompt.tokens, prompt.keys, prompt.write)
    told = push(grpc_route, "a", *messages)
    expected = TransportLost if damage == "no commit" else BlockCorrupt
    assert isinstance(told, expected)
    assert isinstance(arrived.exception(20), expected)
    assert len(grpc_route.landings) == 0


def test_nobody_listens(codec: BlockCodec) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        channels = Channels(codec, default_transports())
        endpoint = f"grpc://127.0.0.1:{taken.getsockname()[1]}"
        prompt = Prompt(codec, 64 * 100)
        error = outcome(prompt, Route(codec, channels, Landings(codec), endpoint).open("a"))
        assert isinstance(error, TransportLost)
        assert endpoint in str(error)
        channels.close()


def test_the_receiver_goes_in_mid_stream_and_comes_back(codec: BlockCodec) -> None:
    landings = Landings(codec)
    server = TransferServer(landings)
    channels = Channels(codec, default_transports())
    route = Route(codec, channels, landings, f"grpc://127.0.0.1:{server.port}")
    prompt = Prompt(codec, 64 * 60)
    arrived = landings.expect("a", prompt.tokens, prompt.keys, prompt.write)
    sender = route.open("a")
    for layer, index in list(prompt.arena)[:100]:
        sender.send(*prompt.block(layer, index))
    until(lambda: len(prompt.landed) > 0)
    server.stop()
    assert isinstance(outcome(prompt, sender), TransportLost)
    assert isinstance(arrived.exception(20), TransportLost)
    assert len(landings) == 0

    server = TransferServer(landings, server.port)

    def works() -> bool:
        try:
            route.hand_over(prompt, "b")
        except TransportLost:
            landings.close("b")
            return False
        return True

    until(works)
    assert prompt.landed == prompt.expected
    channels.close()
    server.stop()


def test_a_slow_receiver_holds_the_sender_back(codec: BlockCodec) -> None:
    # Blocks of 2 MiB: the queue and gRPC's own windows hold a few of them.
    codec = small_codec("none", layers=20, kv_heads=32, head_dim=128)
    landings = Landings(codec)
    server = TransferServer(landings)
    channels = Channels(codec, default_transports())
    route = Route(codec, channels, landings, f"grpc://127.0.0.1:{server.port}")
    prompt = Prompt(codec, 128)
    go_on = threading.Event()

    def slow(layer: int, index: int, payload: memoryview) -> None:
        go_on.wait(20)
        prompt.write(layer, index, payload)

    arrived = landings.expect("a", prompt.tokens, prompt.keys, slow)
    sender = route.open("a")
    sent: list[int] = []

    def engine() -> None:
        for header, payload in prompt.blocks():
            sender.send(header, payload)
            sent.append(header.layer)

    thread = threading.Thread(target=engine)
    thread.start()
    until(lambda: len(sent) > 15)
    began = perf_counter()
    thread.join(0.3)
    assert thread.is_alive()
    assert len(sent) < len(prompt.arena) - 5
    waited = perf_counter() - began
    go_on.set()
    thread.join(20)
    handover = sender.commit(prompt.tokens, 1).result(20)
    assert handover.seconds > waited
    assert arrived.result(20).blocks == len(prompt.arena)
    assert prompt.landed == prompt.expected
    channels.close()
    server.stop()


def test_an_abort_frees_a_sender_that_is_held_back(codec: BlockCodec) -> None:
    codec = small_codec("none", layers=20, kv_heads=32, head_dim=128)
    landings = Landings(codec)
    server = TransferServer(landings)
    channels = Channels(codec, default_transports())
    prompt = Prompt(codec, 128)
    go_on = threading.Event()
    landings.expect("a", prompt.tokens, prompt.keys, lambda layer, index, payload: void(go_on.wait(20)))
    sender = Route(codec, channels, landings, f"grpc://127.0.0.1:{server.port}").open("a")
    errors: list[KvrelayError | None] = []
    thread = threading.Thread(target=lambda: errors.append(outcome(prompt, sender)))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    sender.abort()
    thread.join(20)
    assert isinstance(errors[0], Cancelled)
    go_on.set()
    until(lambda: len(landings) == 0)
    channels.close()
    server.stop()


def test_a_receiver_that_takes_nothing_is_given_up(
    codec: BlockCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kv_transfer.queued.STALL_SECONDS", 0.2)
    codec = small_codec("none", layers=20, kv_heads=32, head_dim=128)
    landings = Landings(codec)
    server = TransferServer(landings)
    channels = Channels(codec, default_transports())
    prompt = Prompt(codec, 128)
    go_on = threading.Event()
    landings.expect("a", prompt.tokens, prompt.keys, lambda layer, index, payload: void(go_on.wait(20)))
    sender = Route(codec, channels, landings, f"grpc://127.0.0.1:{server.port}").open("a")
    error = outcome(prompt, sender)
    assert isinstance(error, TransportLost)
    assert "nothing of lease a was taken" in str(error)
    go_on.set()
    until(lambda: len(landings) == 0)
    channels.close()
    server.stop()


def test_the_server_answers_other_streams_meanwhile(grpc_route: Route, codec: BlockCodec) -> None:
    # A stream that stays open must not keep a second one on the same connection from landing.
    waiting = Prompt(codec, 64 * 10, seed=1)
    grpc_route.landings.expect("waits", waiting.tokens, waiting.keys, waiting.write)
    open_stream = grpc_route.open("waits")
    open_stream.send(*waiting.block(0, 0))
    prompt = Prompt(codec, 500, seed=2)
    grpc_route.hand_over(prompt, "b")
    assert prompt.landed == prompt.expected
    open_stream.abort()


def void(_: object) -> None:
    """Nothing."""
