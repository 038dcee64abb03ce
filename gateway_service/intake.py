"""What gRPC and HTTP have in common: a request is checked, tokenized, and run to its end."""

import asyncio
import logging
import secrets

from gateway_service.admission import Admission
from gateway_service.answer import Answer
from gateway_service.config import GatewayConfig
from gateway_service.directory import WorkerDirectory
from gateway_service.metrics import GatewayMetrics
from gateway_service.model import ServedModel
from gateway_service.request import Request, Send
from gateway_service.router import Router
from gateway_service.validation import (
    MAX_REQUEST_ID_CHARS,
    check_chat,
    check_fields,
    check_length,
    check_request,
    check_text,
    resolved,
)
from kvrelay.errors import Draining, Internal, InvalidArgument, KvrelayError
from kvrelay.v1.inference_pb2 import Chat, Finish, GenerateRequest, TokenizeRequest
from kvrelay.v1.sampling_pb2 import FinishReason

log = logging.getLogger(__name__)

LONG_TEXT_CHARS = 32 * 1024
"""Longer texts are tokenized beside the event loop, which they would hold up."""


class Intake:
    """Takes requests in and sees to it that each ends in Finish or in one leaf of the error tree."""

    def __init__(
        self, config: GatewayConfig, model: ServedModel, directory: WorkerDirectory, metrics: GatewayMetrics
    ) -> None:
        self.model = model
        self.metrics = metrics
        self._config = config
        self._directory = directory
        self._admission = Admission(
            directory, Router(config.affinity_blocks), config.max_queued, config.worker_wait_seconds
        )
        self._running: dict[str, asyncio.Task[object] | None] = {}
        self._stopping = False
        metrics.running.set_function(lambda: self.running)
        metrics.queued.set_function(lambda: self.queued)

    @property
    def running(self) -> int:
        """Requests that have a place at workers."""
        return len(self._running) - self._admission.queued

    @property
    def queued(self) -> int:
        """Requests that wait for one."""
        return self._admission.queued

    async def generate(self, request: GenerateRequest, send: Send) -> None:
        """Answer a request: PromptInfo, TokenDeltas and Finish, each passed to `send`.

        Raises:
            KvrelayError: the leaf that the request ended with.
        """
        request_id = request.request_id or secrets.token_hex(8)
        if request_id in self._running:
            raise InvalidArgument(f"a request {request_id[:MAX_REQUEST_ID_CHARS]!r} is running already")
        self._running[request_id] = asyncio.current_task()
        outcome = "Internal"
        try:
            if self._stopping:
                raise Draining("the gateway is stopping")
            arrived = asyncio.get_running_loop().time()
            prepared = await self._prepare(request_id, request, arrived)
            finish = await prepared.run(send)
            outcome = FinishReason.Name(finish.reason)
            self._count(finish)
        except KvrelayError as error:
            outcome = type(error).__name__
            log.info("request %s: %s: %s", request_id, outcome, error)
            raise
        except asyncio.CancelledError:
            outcome = "Cancelled"
            if self._stopping:
                raise Draining("the gateway is stopping") from None
            raise
        except Exception as error:
            log.exception("request %s failed", request_id)
            raise Internal(f"{type(error).__name__}: {error}") from error
        finally:
            del self._running[request_id]
            self.metrics.requests.labels(outcome).inc()

    async def tokenize(self, request: TokenizeRequest) -> list[int]:
        """The ids of a text or chat, as `generate` would see them.

        Raises:
            InvalidArgument, PromptTooLong: as for a prompt.
        """
        check_fields(request)
        match request.WhichOneof("prompt"):
            case "text":
                check_text(request.text, self._config.max_prompt_bytes)
                return await self._encode(request.text)
            case "chat":
                check_chat(request.chat, self._config.max_prompt_bytes)
                return await self._encode_chat(request.chat)
            case _:
                raise InvalidArgument("a prompt is missing: text or chat")

    async def stop(self, grace: float) -> None:
        """Refuse new requests, and end with Draining what still runs after `grace` seconds."""
        self._stopping = True
        tasks = [task for task in self._running.values() if task is not None]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace)
            for task in late:
                task.cancel()

    async def _prepare(self, request_id: str, request: GenerateRequest, arrived: float) -> Request:
        model = self.model
        check_request(request, model, self._config.max_prompt_bytes)
        match request.WhichOneof("prompt"):
            case "text":
                prompt = await self._encode(request.text)
            case "chat":
                prompt = await self._encode_chat(request.chat)
            case _:
                prompt = list(request.token_ids.ids)
        check_length(len(prompt), request.sampling, model.context)
        sampling = resolved(request.sampling)
        answer = Answer(prompt, sampling, model.config.stop_ids, model.context, model.tokenizer.detokenizer())
        return Request(
            request_id,
            answer,
            sampling,
            self._admission,
            self._directory,
            self.metrics,
            self._config,
            arrived,
        )

    async def _encode(self, text: str) -> list[int]:
        if len(text) > LONG_TEXT_CHARS:
            return await asyncio.to_thread(self.model.encode_text, text)
        return self.model.encode_text(text)

    async def _encode_chat(self, chat: Chat) -> list[int]:
        messages = [(message.role, message.content) for message in chat.messages]
        if sum(len(content) for _, content in messages) > LONG_TEXT_CHARS:
            return await asyncio.to_thread(self.model.encode_chat, messages)
        return self.model.encode_chat(messages)

    def _count(self, finish: Finish) -> None:
        self.metrics.prompt_tokens.inc(finish.usage.prompt_tokens)
        self.metrics.completion_tokens.inc(finish.usage.completion_tokens)
        self.metrics.queue_seconds.observe(finish.timing.queue_seconds)
