"""PrefillService over the engine: a stream is one prompt."""

import time
from collections.abc import AsyncIterator, Callable
from functools import cached_property
from typing import Any

import grpc.aio
import numpy as np

from kv_transfer.channel import Channels
from kvrelay.errors import InvalidArgument, KvrelayError
from kvrelay.rpc import EventStream, Outbox, statuses
from kvrelay.v1 import prefill_pb2 as pb
from kvrelay.v1 import prefill_pb2_grpc
from model_runtime.sampler import SamplingConfig
from prefill_service.engine import PrefillEngine
from prefill_service.job import Event, PrefillJob


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """Turns calls into jobs, and what jobs emit into messages."""

    def __init__(self, engine: PrefillEngine, channels: Channels) -> None:
        self._engine = engine
        self._channels = channels

    @cached_property
    def _outbox(self) -> Outbox[pb.PrefillResponse]:
        return Outbox()

    async def Prefill(
        self, request: pb.PrefillRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[pb.PrefillResponse]:
        """Read a prompt; the stream is the caller's hold on it."""
        events = EventStream(self._outbox)
        async with statuses(context):
            job = self._job(request, events.emit)
            try:
                self._engine.submit(job)
            except KvrelayError:
                if job.sender is not None:
                    job.sender.abort()
                raise
            try:
                async for event in events:
                    yield event
            finally:
                self._engine.cancel(job)

    def _job(self, request: pb.PrefillRequest, emit: Callable[[Event], None]) -> PrefillJob:
        config = self._engine.decoder.config
        ids = np.array(request.token_ids, np.int64)
        if not 0 < request.prompt_tokens <= len(ids) or ids.max() >= config.vocabulary:
            raise InvalidArgument("token_ids need at least one prompt token, and ids within the vocabulary")
        sampling = SamplingConfig.of_message(request.sampling, config.stop_ids)
        sampling.validate(config.vocabulary)
        return PrefillJob(
            request_id=request.request_id,
            token_ids=ids.astype(np.int32),
            prompt_tokens=request.prompt_tokens,
            sampling=sampling,
            sender=self._channels.open(request.lease) if request.HasField("lease") else None,
            emit=emit,
            queued_at=time.monotonic(),
        )
