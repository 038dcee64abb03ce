"""InferenceService over the intake."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from gateway_service.intake import Intake
from gateway_service.validation import check_fields
from kvrelay.errors import InvalidArgument
from kvrelay.rpc import statuses
from kvrelay.v1 import inference_pb2 as pb

SERVICE = "kvrelay.v1.InferenceService"

M = TypeVar("M", bound=Message)
SETTLE_SECONDS = 0.5


def reader(kind: type[M]) -> Callable[[bytes], M | InvalidArgument]:
    """Parses a request; what cannot be parsed (a string that is not UTF-8) becomes an error to be raised.

    gRPC itself would answer INTERNAL, as if the fault were ours.
    """

    def read(data: bytes) -> M | InvalidArgument:
        try:
            return kind.FromString(data)
        except DecodeError as error:
            return InvalidArgument(f"not a {kind.__name__}: {error}")

    return read


def well_formed(request: M | InvalidArgument) -> M:
    """The request, or raise what `reader` made of it."""
    if isinstance(request, InvalidArgument):
        raise request
    return request


class Writer:
    """Writes a call's messages; what has begun is ended before the call gets its status.

    gRPC takes no status beside a message on its way, and whoever cancels the call may cancel a write.
    """

    def __init__(self, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        self._context = context
        self._writing: asyncio.Future[None] | None = None

    async def write(self, message: Message) -> None:
        """Returns when the client can take the next one."""
        self._writing = asyncio.ensure_future(self._context.write(message))
        await asyncio.shield(self._writing)

    async def settle(self) -> None:
        """Wait for a write in flight, but not for a client that takes no more."""
        if self._writing is not None and not self._writing.done():
            await asyncio.wait((self._writing,), timeout=SETTLE_SECONDS)


class InferenceServicer:
    """The gRPC front door."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    def register(self, server: grpc.aio.Server) -> None:
        """Add the service to a server."""
        handlers = {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self.generate, reader(pb.GenerateRequest), pb.GenerateResponse.SerializeToString
            ),
            "GetModel": grpc.unary_unary_rpc_method_handler(
                self.get_model, reader(pb.GetModelRequest), pb.GetModelResponse.SerializeToString
            ),
            "Tokenize": grpc.unary_unary_rpc_method_handler(
                self.tokenize, reader(pb.TokenizeRequest), pb.TokenizeResponse.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def generate(
        self, request: pb.GenerateRequest | InvalidArgument, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> None:
        """Answer a prompt; gRPC cancels this when the client drops the stream."""
        writer = Writer(context)
        async with statuses(context):
            try:
                await self._intake.generate(well_formed(request), writer.write)
            finally:
                await writer.settle()

    async def get_model(
        self, request: pb.GetModelRequest | InvalidArgument, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.GetModelResponse:
        """Name and limits of the served model."""
        async with statuses(context):
            check_fields(well_formed(request))
        model = self._intake.model
        return pb.GetModelResponse(
            name=model.name,
            family=model.config.family,
            context=model.context,
            vocabulary=model.vocabulary,
            kv_format=model.kv_format,
            fingerprint=model.config.fingerprint,
        )

    async def tokenize(
        self, request: pb.TokenizeRequest | InvalidArgument, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.TokenizeResponse:
        """The ids of a text or chat."""
        async with statuses(context):
            return pb.TokenizeResponse(ids=await self._intake.tokenize(well_formed(request)))
