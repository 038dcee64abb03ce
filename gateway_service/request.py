"""One request's life: attempts at pairs of workers until the answer is complete, as one stream of events."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from math import inf
from typing import Any

from gateway_service.admission import Admission, Place
from gateway_service.answer import Answer
from gateway_service.config import GatewayConfig
from gateway_service.directory import WorkerDirectory
from gateway_service.metrics import GatewayMetrics
from gateway_service.stream import WorkerError, WorkerStream
from gateway_service.worker import Worker
from kvrelay.errors import Internal, NoWorker
from kvrelay.v1.decode_pb2 import DecodeRequest, DecodeResponse
from kvrelay.v1.inference_pb2 import Finish, GenerateResponse, PromptInfo, Timing, TokenDelta, Usage
from kvrelay.v1.prefill_pb2 import Lease, PrefillRequest, PrefillResponse
from kvrelay.v1.sampling_pb2 import SampledToken, SamplingParams

log = logging.getLogger(__name__)

Send = Callable[[GenerateResponse], Awaitable[None]]
"""Takes a request's events in order; returns when the client can take the next one."""

HANDOVER_GRACE_SECONDS = 0.1
"""How long the end of a very short answer waits for the hand-over's figures, which come on another stream."""

PAUSE_SECONDS = 0.1
"""Wait before the second retry, and twice that before the third; the first goes at once."""


class Request:
    """A checked and tokenized request.

    An attempt is given the prompt and all tokens answered so far, and yields the next ones. Counter-based
    sampling makes them the same wherever they are drawn, so it takes up where the one before it broke.
    """

    def __init__(
        self,
        request_id: str,
        answer: Answer,
        sampling: SamplingParams,
        admission: Admission,
        directory: WorkerDirectory,
        metrics: GatewayMetrics,
        config: GatewayConfig,
        arrived: float,
    ) -> None:
        """`sampling` carries a seed, and from the first reservation on the number of tokens too.

        `arrived` is the loop's time when the request came in.
        """
        self.request_id = request_id
        self._answer = answer
        self._sampling = sampling
        self._admission = admission
        self._directory = directory
        self._metrics = metrics
        self._config = config
        self._usage = Usage(prompt_tokens=answer.prompt_tokens)
        self._timing = Timing()
        self._prompt_told = False
        self._loop = asyncio.get_running_loop()
        self._arrived = arrived
        self._last_token_at = 0.0

    async def run(self, send: Send) -> Finish:
        """Answer with PromptInfo, TokenDeltas and Finish, each passed to `send`; returns the last.

        Raises:
            KvrelayError: the leaf that the request ended with.
        """
        failed_at: list[str] = []
        while True:
            asked = self._loop.time()
            place = await self._admission.take(
                self._answer.token_ids, self._answer.left > 1, frozenset(failed_at), again=bool(failed_at)
            )
            self._timing.queue_seconds += self._loop.time() - asked
            try:
                await self._attempt(place, send)
                break
            except WorkerError as fault:
                failed_at.append(fault.worker_id)
                log.warning("request %s: %s, %d tokens answered", self.request_id, fault, self._answer.tokens)
                if len(failed_at) > self._config.retries:
                    raise NoWorker(f"{len(failed_at)} attempts failed, the last one at {fault}") from None
                # The one that reports a fault need not be the one that has it.
                self._directory.doubt(place.workers)
                self._timing.migrations += 1
                self._metrics.migrations.inc()
            finally:
                place.release()
            await asyncio.sleep(PAUSE_SECONDS * (len(failed_at) - 1))
        return await self._finish(send)

    async def _attempt(self, place: Place, send: Send) -> None:
        """Go on from the tokens answered so far, to the end of the answer."""
        if place.decode is None:
            with self._open_prefill(place.prefill, None) as prefill:
                return await self._first_token(place, prefill, send)
        with self._open_decode(place.decode) as decode:
            lease = await self._reserve(decode)
            with self._open_prefill(place.prefill, lease) as prefill:
                # Each stream is read beside the other, so that the end of one is not waited for at the other.
                joined = asyncio.create_task(decode.read())
                joined.add_done_callback(partial(_pass_on, prefill))
                await self._first_token(place, prefill, send)
                if self._answer.reason is not None:
                    return None
                decode.allow_silence(self._config.stall_seconds)
                handover = asyncio.create_task(self._hand_over(place, prefill))
                handover.add_done_callback(partial(_pass_on, decode, unless=joined))
                await self._decode(decode, joined, send)
                await asyncio.wait((handover,), timeout=HANDOVER_GRACE_SECONDS)

    def _open_decode(self, worker: Worker) -> WorkerStream[DecodeResponse]:
        request = DecodeRequest(
            request_id=self.request_id,
            token_ids=self._answer.token_ids,
            prompt_tokens=self._answer.prompt_tokens,
            sampling=self._sampling,
        )
        stream: WorkerStream[DecodeResponse] = worker.open(worker.decode.Decode, request)
        stream.allow_silence(self._config.wait_seconds)
        return stream

    def _open_prefill(self, worker: Worker, lease: Lease | None) -> WorkerStream[PrefillResponse]:
        request = PrefillRequest(
            request_id=self.request_id,
            token_ids=self._answer.token_ids,
            prompt_tokens=self._answer.prompt_tokens,
            sampling=self._sampling,
            lease=lease,
        )
        stream: WorkerStream[PrefillResponse] = worker.open(worker.prefill.Prefill, request)
        stream.allow_silence(self._config.wait_seconds)
        return stream

    async def _reserve(self, decode: WorkerStream[DecodeResponse]) -> Lease:
        """Wait for the slot; its worker's bound on the answer holds for all later attempts too."""
        event = await decode.expect()
        if event.WhichOneof("event") != "reserved":
            raise WorkerError(decode.worker.worker_id, Internal("the stream did not begin with Reserved"))
        decode.allow_silence(inf)
        self._answer.limit_to(event.reserved.max_tokens)
        self._sampling.max_tokens = self._answer.tokens + self._answer.left
        return event.reserved.lease

    async def _first_token(self, place: Place, prefill: WorkerStream[PrefillResponse], send: Send) -> None:
        """Tell what became of the prompt, and pass on the token that prefill draws."""
        while True:
            event = await prefill.expect()
            match event.WhichOneof("event"):
                case "admitted":
                    self._timing.queue_seconds += event.admitted.queue_seconds
                    if not self._prompt_told:
                        self._prompt_told = True
                        self._usage.cached_tokens = event.admitted.cached_tokens
                        await send(self._event(prompt=self._prompt_info(place)))
                case "first_token":
                    self._timing.prefill_seconds += event.first_token.prefill_seconds
                    return await self._pass_tokens([event.first_token.token], send)

    async def _hand_over(self, place: Place, prefill: WorkerStream[PrefillResponse]) -> None:
        """Read the rest of the prefill stream, and give its worker back."""
        event = await prefill.expect()
        self._timing.handover_seconds += event.handed_over.seconds
        place.release_prefill()
        await prefill.read()

    async def _decode(
        self,
        decode: WorkerStream[DecodeResponse],
        joined: "asyncio.Task[DecodeResponse | None]",
        send: Send,
    ) -> None:
        """Pass on the tokens of the decode stream until the answer ends."""
        event = await joined
        while event is not None:
            match event.WhichOneof("event"):
                case "tokens":
                    await self._pass_tokens(event.tokens.tokens, send)
                    if self._answer.reason is not None:
                        return
                case "joined":
                    self._timing.blocks_moved += event.joined.blocks
                    self._timing.bytes_moved += event.joined.bytes
                case "finished":
                    if text := self._answer.end(event.finished.reason):
                        await send(self._event(delta=TokenDelta(text=text)))
                    return
            event = await decode.read()
        raise WorkerError(decode.worker.worker_id, NoWorker("the decode stream ended without Finished"))

    async def _pass_tokens(self, tokens: Sequence[SampledToken], send: Send) -> None:
        delta = self._answer.add(tokens)
        now = self._loop.time()
        if self._last_token_at:
            self._metrics.inter_token_seconds.observe(now - self._last_token_at)
        else:
            self._timing.time_to_first_token_seconds = now - self._arrived
            self._metrics.first_token_seconds.observe(now - self._arrived)
        self._last_token_at = now
        await send(self._event(delta=delta))

    async def _finish(self, send: Send) -> Finish:
        self._usage.completion_tokens = self._answer.tokens
        self._timing.total_seconds = self._loop.time() - self._arrived
        finish = Finish(
            reason=self._answer.reason, usage=self._usage, timing=self._timing, stop=self._answer.stop
        )
        await send(self._event(finish=finish))
        return finish

    def _prompt_info(self, place: Place) -> PromptInfo:
        return PromptInfo(
            prompt_tokens=self._usage.prompt_tokens,
            cached_tokens=self._usage.cached_tokens,
            seed=self._sampling.seed,
            prefill_worker=place.prefill.worker_id,
            decode_worker="" if place.decode is None else place.decode.worker_id,
        )

    def _event(
        self,
        prompt: PromptInfo | None = None,
        delta: TokenDelta | None = None,
        finish: Finish | None = None,
    ) -> GenerateResponse:
        return GenerateResponse(request_id=self.request_id, prompt=prompt, delta=delta, finish=finish)


def _pass_on(
    stream: WorkerStream[Any], task: "asyncio.Task[Any]", unless: "asyncio.Task[Any] | None" = None
) -> None:
    """Give `stream` up when the task that reads its counterpart fails, `unless` another has ended by then."""
    error = None if task.cancelled() else task.exception()
    if isinstance(error, Exception) and not (unless is not None and unless.done()):
        stream.give_up(error)
