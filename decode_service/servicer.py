"""DecodeService over the engine: a stream is one slot."""

import uuid
from collections.abc import AsyncIterator, Callable
from functools import cached_property
from typing import Any

import grpc.aio

from decode_service.engine import DecodeEngine
from decode_service.slot import Event, Slot
from kvrelay.errors import InvalidArgument, PromptTooLong
from kvrelay.rpc import EventStream, Outbox, statuses
from kvrelay.v1 import decode_pb2 as pb
from kvrelay.v1 import decode_pb2_grpc
from model_runtime.sampler import SamplingConfig


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """Turns calls into slots, and what slots emit into messages."""

    def __init__(self, engine: DecodeEngine) -> None:
        self._engine = engine

    @cached_property
    def _outbox(self) -> Outbox[pb.DecodeResponse]:
        return Outbox()

    async def Decode(
        self, request: pb.DecodeRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[pb.DecodeResponse]:
        """Hold a slot and stream its tokens; the stream is the caller's hold on it."""
        events = EventStream(self._outbox)
        async with statuses(context):
            slot = self._slot(request, events.emit)
            self._engine.submit(slot)
            try:
                async for event in events:
                    yield event
            finally:
                self._engine.cancel(slot)

    def _slot(self, request: pb.DecodeRequest, emit: Callable[[Event], None]) -> Slot:
        config = self._engine.decoder.config
        ids, prompt = list(request.token_ids), request.prompt_tokens
        if not 0 < prompt <= len(ids) or max(ids) >= config.vocabulary:
            raise InvalidArgument("token_ids need at least one prompt token, and ids within the vocabulary")
        sampling = SamplingConfig.of_message(request.sampling, config.stop_ids)
        sampling.validate(config.vocabulary)
        room = self._engine.decoder.context - prompt
        max_tokens = min(sampling.max_tokens or self._engine.config.default_max_tokens, room)
        if max_tokens <= len(ids) - prompt:
            raise PromptTooLong(f"{len(ids)} tokens leave no room for another one in {prompt + max_tokens}")
        return Slot(
            request_id=request.request_id,
            lease_id=uuid.uuid4().hex,
            prompt_ids=ids[:prompt],
            answer_ids=ids[prompt:],
            sampling=sampling,
            max_tokens=max_tokens,
            emit=emit,
        )
