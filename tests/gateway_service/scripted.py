"""Small workers that follow a script: real gRPC servers, deterministic tokens, faults where tests want them.

The next token depends on every token before it and on the seed, as a model's would: an attempt that is given
other tokens than were answered shows in the answer.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import grpc.aio

from kvrelay.errors import Draining, KvrelayError, TransportLost
from kvrelay.rpc import SERVER_OPTIONS, statuses
from kvrelay.v1 import decode_pb2 as decode_pb
from kvrelay.v1 import decode_pb2_grpc, prefill_pb2_grpc, worker_pb2_grpc
from kvrelay.v1 import prefill_pb2 as prefill_pb
from kvrelay.v1 import worker_pb2 as worker_pb
from kvrelay.v1.sampling_pb2 import FinishReason, SampledToken, SamplingParams, TokenLogprob
from tests.gateway_service.byte_model import EOS, FIRST_LETTER, LETTERS

DIE, HANG = "die", "hang"


def next_token(token_ids: Sequence[int], seed: int) -> int:
    """A letter that follows from all tokens so far."""
    return FIRST_LETTER + crc32(repr((seed, list(token_ids))).encode()) % LETTERS


def expected_answer(prompt: Sequence[int], seed: int, tokens: int) -> list[int]:
    """What a request without faults is answered."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(next_token(ids, seed))
    return ids[len(prompt) :]


@dataclass
class Fault:
    """What goes wrong in one call: at a point, the worker dies, hangs, or fails the call with an error."""

    at: str | int
    """Prefill: "start", "admitted", "first_token". Decode: "start", "reserved", "joined", or tokens sent."""
    what: str | KvrelayError


@dataclass
class Landing:
    """Where a decode worker waits for a hand-over."""

    worker: "ScriptedWorker"
    first_token: "asyncio.Future[int]"


@dataclass
class ScriptedWorker:
    """Base of both pools' workers."""

    worker_id: str
    landings: dict[str, Landing]
    slots: int = 4
    state: worker_pb.WorkerState = worker_pb.WORKER_STATE_READY
    script: deque[Fault] = field(default_factory=deque)
    """Faults of the next calls, one each; None of them left: all goes well."""
    requests: list[Any] = field(default_factory=list)
    open_streams: int = 0
    most_open: int = 0
    port: int = 0
    pause: float = 0.0
    """Seconds before each token."""
    silent: bool = False
    """Whether status calls hang."""
    answer: Sequence[int] | None = None
    """Tokens to answer instead of `next_token`'s; the last is followed by EOS."""
    _server: grpc.aio.Server | None = None

    pool = worker_pb.POOL_UNSPECIFIED

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Serve, at the same port as before if it was started before."""
        server = grpc.aio.server(options=SERVER_OPTIONS)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(_Status(self), server)
        self.register(server)
        self.port = server.add_insecure_port(f"127.0.0.1:{self.port}")
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """Be gone, with all open calls."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)

    def register(self, server: grpc.aio.Server) -> None:
        raise NotImplementedError

    def token(self, ids: Sequence[int], prompt_tokens: int, sampling: SamplingParams) -> SampledToken:
        """The next token, with log-probabilities where they are asked for."""
        if self.answer is None:
            token_id = next_token(ids, sampling.seed)
        else:
            done = len(ids) - prompt_tokens
            token_id = self.answer[done] if done < len(self.answer) else EOS
        if not sampling.HasField("logprobs"):
            return SampledToken(token_id=token_id)
        top = [TokenLogprob(token_id=token_id + n, logprob=-0.5 - n) for n in range(sampling.logprobs)]
        return SampledToken(token_id=token_id, logprob=-0.5, top=top)

    async def meet(self, fault: Fault | None, at: str | int) -> None:
        """The point where a script may have something happen."""
        if fault is None or fault.at != at:
            return
        if isinstance(fault.what, KvrelayError):
            raise fault.what
        if fault.what == DIE:
            self._dying = asyncio.create_task(self.stop())
        await asyncio.Event().wait()

    def take_call(self, request: Any) -> Fault | None:
        self.requests.append(request)
        self.open_streams += 1
        self.most_open = max(self.most_open, self.open_streams)
        if self.state == worker_pb.WORKER_STATE_DRAINING:
            raise Draining(f"{self.worker_id} takes no new request")
        return self.script.popleft() if self.script else None


class _Status(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, worker: ScriptedWorker) -> None:
        self.worker = worker

    async def GetWorkerStatus(  # noqa: N802
        self, request: worker_pb.GetWorkerStatusRequest, context: Any
    ) -> worker_pb.GetWorkerStatusResponse:
        if self.worker.silent:
            await asyncio.Event().wait()
        return worker_pb.GetWorkerStatusResponse(
            worker_id=self.worker.worker_id,
            pool=self.worker.pool,
            state=self.worker.state,
            running=self.worker.open_streams,
            slots=self.worker.slots,
            slots_free=max(0, self.worker.slots - self.worker.open_streams),
        )


class ScriptedPrefill(ScriptedWorker, prefill_pb2_grpc.PrefillServiceServicer):
    """Draws the first token, and hands over by telling it to the decode worker of the lease."""

    pool = worker_pb.POOL_PREFILL

    def register(self, server: grpc.aio.Server) -> None:
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self, server)

    async def Prefill(  # noqa: N802
        self, request: prefill_pb.PrefillRequest, context: Any
    ) -> AsyncIterator[prefill_pb.PrefillResponse]:
        async with statuses(context):
            try:
                fault = self.take_call(request)
                await self.meet(fault, "start")
                yield prefill_pb.PrefillResponse(
                    admitted=prefill_pb.Admitted(cached_tokens=len(request.token_ids) // 64 * 64)
                )
                await self.meet(fault, "admitted")
                await asyncio.sleep(self.pause)
                token = self.token(request.token_ids, request.prompt_tokens, request.sampling)
                yield prefill_pb.PrefillResponse(
                    first_token=prefill_pb.FirstToken(token=token, prefill_seconds=0.25)
                )
                await self.meet(fault, "first_token")
                if not request.HasField("lease"):
                    return
                landing = self.landings.get(request.lease.lease_id)
                if landing is None:
                    raise TransportLost(f"no lease {request.lease.lease_id}")
                if not landing.first_token.done():
                    landing.first_token.set_result(token.token_id)
                yield prefill_pb.PrefillResponse(
                    handed_over=prefill_pb.HandedOver(blocks=30, bytes=3000, seconds=0.125)
                )
            finally:
                self.open_streams -= 1


class ScriptedDecode(ScriptedWorker, decode_pb2_grpc.DecodeServiceServicer):
    """Holds a slot, and goes on from the first token."""

    pool = worker_pb.POOL_DECODE
    counter = itertools.count()
    default_max_tokens = 50

    def register(self, server: grpc.aio.Server) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)

    async def Decode(  # noqa: N802
        self, request: decode_pb.DecodeRequest, context: Any
    ) -> AsyncIterator[decode_pb.DecodeResponse]:
        async with statuses(context):
            lease_id = f"{self.worker_id}/{next(self.counter)}"
            try:
                fault = self.take_call(request)
                await self.meet(fault, "start")
                sampling = request.sampling
                most = sampling.max_tokens if sampling.HasField("max_tokens") else self.default_max_tokens
                ids = list(request.token_ids)
                left = most - (len(ids) - request.prompt_tokens)
                landing = Landing(self, asyncio.get_running_loop().create_future())
                self.landings[lease_id] = landing
                lease = prefill_pb.Lease(lease_id=lease_id, endpoint=f"scripted://{self.worker_id}")
                yield decode_pb.DecodeResponse(reserved=decode_pb.Reserved(lease=lease, max_tokens=left))
                await self.meet(fault, "reserved")
                ids.append(await landing.first_token)
                yield decode_pb.DecodeResponse(joined=decode_pb.Joined(blocks=30, bytes=3000))
                await self.meet(fault, "joined")
                for sent in range(left - 1):
                    await self.meet(fault, sent)
                    await asyncio.sleep(self.pause)
                    token = self.token(ids, request.prompt_tokens, sampling)
                    ids.append(token.token_id)
                    yield decode_pb.DecodeResponse(tokens=decode_pb.DecodedTokens(tokens=[token]))
                    if token.token_id == EOS and not sampling.ignore_eos:
                        yield _finished(FinishReason.FINISH_REASON_STOP)
                        return
                yield _finished(FinishReason.FINISH_REASON_LENGTH)
            finally:
                self.landings.pop(lease_id, None)
                self.open_streams -= 1


def _finished(reason: FinishReason) -> decode_pb.DecodeResponse:
    return decode_pb.DecodeResponse(finished=decode_pb.Finished(reason=reason))
