"""The channel over gRPC: one client stream of raw bytes a hand-over."""

from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import grpc
from google.protobuf.message import DecodeError

from kv_transfer.block import BlockCodec
from kv_transfer.channel import Channel, Sender
from kv_transfer.landing import Arrival, Landing, Landings
from kv_transfer.queued import EncodedBlock, QueuedSender
from kvrelay.errors import ERROR_KEY, BlockCorrupt, Internal, KvrelayError, TransportLost, error_of_status
from kvrelay.v1.transfer_pb2 import Commit, PushResponse

SERVICE = "kvrelay.v1.TransferService"
PATH = f"/{SERVICE}/Push"
LEASE_KEY = "kvrelay-lease"
COMMIT_MAGIC = b"KVRC"
HANDOVER_SECONDS = 3600.0
"""Bound on a hand-over, the time that prefill computes included."""


def transfer_handler(landings: Landings) -> grpc.GenericRpcHandler:
    """What a `grpc.aio.Server` answers `TransferService/Push` with, by `add_generic_rpc_handlers`.

    The server has to take messages of 1 MiB, or of one block where that is larger; gRPC's own bound is 4 MiB.
    Blocks are checked and copied on the server's loop: a message is about 1 MiB, which keeps the loop
    for less than half a millisecond, about what handing it to another thread would cost.
    """

    async def push(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        metadata = dict(context.invocation_metadata() or ())
        try:
            landing = landings.find(str(metadata.get(LEASE_KEY, "")))
            arrival = await _receive(messages, landing)
        except KvrelayError as error:
            await context.abort(error.code, str(error), error.trailing_metadata)
        return PushResponse(blocks=arrival.blocks, bytes=arrival.bytes).SerializeToString()

    return grpc.method_handlers_generic_handler(SERVICE, {"Push": grpc.stream_unary_rpc_method_handler(push)})


async def _receive(messages: AsyncIterator[bytes], landing: Landing) -> Arrival:
    try:
        async for message in messages:
            if not message.startswith(COMMIT_MAGIC):
                landing.land(message)
                continue
            try:
                return landing.commit(Commit.FromString(message[len(COMMIT_MAGIC) :]))
            except DecodeError as error:
                raise BlockCorrupt(f"lease {landing.lease_id}: a commit that cannot be read") from error
        raise landing.abandoned()
    except KvrelayError as error:
        landing.fail(error)
        raise
    finally:
        # Also where the stream was cancelled. Does nothing once the lease has ended.
        landing.fail(landing.abandoned())


class GrpcChannel(Channel):
    """The transport of the scheme `grpc`: `grpc://host:port`."""

    def __init__(self, endpoint: str, codec: BlockCodec) -> None:
        self._codec = codec
        self._endpoint = endpoint
        # A worker that comes back at the same address is found at once. No keepalive: a stream may be silent
        # for as long as prefill computes, and servers end connections that ping more than every 5 minutes.
        options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1_000)]
        self._channel = grpc.insecure_channel(urlsplit(endpoint).netloc, options)

    def open(self, lease_id: str) -> Sender:
        """Begin a stream; whether the peer answers shows at the next send or commit."""
        return _GrpcSender(self._codec, lease_id, self._endpoint, self._channel.stream_unary(PATH))

    def close(self) -> None:
        """Close the connection; running streams are cancelled."""
        self._channel.close()


class _GrpcSender(QueuedSender):
    def __init__(
        self, codec: BlockCodec, lease_id: str, endpoint: str, push: grpc.StreamUnaryMultiCallable
    ) -> None:
        super().__init__(codec, lease_id)
        self._endpoint = endpoint
        # gRPC's own thread drains the queue, one message ahead of the wire.
        self._call = push.future(
            self._requests(), timeout=HANDOVER_SECONDS, metadata=((LEASE_KEY, lease_id),)
        )
        self._call.add_done_callback(self._settle)

    def _requests(self) -> Iterator[bytes]:
        try:
            yield from self._messages(_joined)
        except Exception as error:
            self._fail(Internal(f"the hand-over of lease {self.lease_id} failed: {error!r}"))
        if self._commit is not None and self._error is None:
            yield COMMIT_MAGIC + self._commit.SerializeToString()

    def _settle(self, call: grpc.Future) -> None:
        if call.cancelled():
            self._fail(TransportLost(f"the stream to {self._endpoint} was cancelled"))
        elif (error := call.exception()) is not None:
            self._fail(self._error_of(error))
        else:
            self._succeed(PushResponse.FromString(call.result()).bytes)

    def _error_of(self, error: BaseException) -> KvrelayError:
        if not isinstance(error, grpc.Call):
            return TransportLost(f"the stream to {self._endpoint} failed: {error!r}")
        trailing = [(key, value) for key, value in error.trailing_metadata() or ()]
        if not any(key == ERROR_KEY for key, _ in trailing):
            status = f"{error.code().name}: {error.details()}"
            return TransportLost(f"the stream to {self._endpoint} failed: {status}")
        return error_of_status(error.code(), error.details(), trailing)

    def _cancel(self) -> None:
        self._call.cancel()


def _joined(blocks: list[EncodedBlock]) -> bytes:
    return b"".join(part for _, head, payload in blocks for part in (head, payload))
