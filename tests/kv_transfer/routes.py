"""A decode worker's receiving end and the channels that lead to it, for each transport."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kv_transfer.block import BlockCodec
from kv_transfer.channel import Channels, Sender
from kv_transfer.embedded import EmbeddedServer
from kv_transfer.grpc_channel import transfer_handler
from kv_transfer.inproc_channel import InprocHub
from kv_transfer.landing import Landings
from kv_transfer.redis_channel import RedisReceiver
from kv_transfer.transports import default_transports
from kvrelay.rpc import ServerThread
from kvrelay.v1.prefill_pb2 import Lease
from tests.kv_transfer.prompts import Prompt


@dataclass
class Route:
    """Both ends."""

    codec: BlockCodec
    channels: Channels
    landings: Landings
    endpoint: str

    def open(self, lease_id: str) -> Sender:
        """Begin a hand-over of a lease."""
        return self.channels.open(Lease(lease_id=lease_id, endpoint=self.endpoint))

    def hand_over(self, prompt: Prompt, lease_id: str, first_token: int = 7) -> None:
        """Hand a whole prompt over, and wait for both ends."""
        arrived = self.landings.expect(lease_id, prompt.tokens, prompt.keys, prompt.write)
        sender = self.open(lease_id)
        prompt.send_all(sender)
        sender.commit(prompt.tokens, first_token).result(20)
        arrived.result(20)


class TransferServer:
    """A gRPC server as a worker has one."""

    def __init__(self, landings: Landings, port: int = 0) -> None:
        self._server = ServerThread("transfer")
        self.port = self._server.start(
            lambda server: server.add_generic_rpc_handlers((transfer_handler(landings),)), f"127.0.0.1:{port}"
        )

    def stop(self) -> None:
        """Stop the server; streams are cut."""
        self._server.stop(0)


@contextmanager
def open_route(name: str, codec: BlockCodec, redis: EmbeddedServer) -> Iterator[Route]:
    """A route over `grpc`, `redis` or `inproc`."""
    landings = Landings(codec)
    hub = InprocHub()
    channels = Channels(codec, {**default_transports(), "inproc": hub.channel})
    if name == "grpc":
        server = TransferServer(landings)
        endpoint, stop = f"grpc://127.0.0.1:{server.port}", server.stop
    elif name == "redis":
        receiver = RedisReceiver(redis.uri, "decode-0", landings)
        receiver.start()
        endpoint, stop = receiver.endpoint, receiver.stop
    else:
        endpoint, stop = hub.listen("decode-0", landings), lambda: hub.forget("decode-0")
    try:
        yield Route(codec, channels, landings, endpoint)
    finally:
        channels.close()
        stop()
