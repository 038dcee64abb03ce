"""The OpenAI-compatible HTTP front door, over the same intake as gRPC."""

import asyncio
import json
import secrets
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway_service.http_schema import ChatRequest, CompletionRequest
from gateway_service.http_shape import ChatShape, Choice, Json, Shape, TextShape, error_body
from gateway_service.intake import Intake
from gateway_service.validation import check_model
from kvrelay.errors import BadSetup, Cancelled, Internal, InvalidArgument, KvrelayError, PromptTooLong
from kvrelay.rpc import MESSAGE_BYTES
from kvrelay.v1.inference_pb2 import GenerateRequest, GenerateResponse

STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

T = TypeVar("T")
Body = TypeVar("Body", CompletionRequest, ChatRequest)


class HttpDoor:
    """Serves the HTTP endpoints from the gateway's own event loop."""

    def __init__(self, intake: Intake, ready: Callable[[], bool]) -> None:
        self._intake = intake
        self._ready = ready
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
            ],
            exception_handlers={KvrelayError: _refuse, Exception: _refuse, 404: _not_found, 405: _not_found},
        )

    async def start(self, host: str, port: int) -> int:
        """Serve at an address, port 0 for a free one; returns the port.

        Raises:
            BadSetup: the port is taken or cannot be bound.
        """
        try:
            listener = socket.create_server((host, port), backlog=1024)
        except OSError as error:
            raise BadSetup(f"cannot listen on {host}:{port}: {error.strerror}") from None
        config = uvicorn.Config(
            self.app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1
        )
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        return listener.getsockname()[1]

    async def stop(self) -> None:
        """Close all connections."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving

    async def models(self, _: Request) -> Response:
        """The one model, as a list."""
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        """The one model by its name."""
        check_model(request.path_params["name"], self._intake.model)
        return JSONResponse(self._model_card())

    async def health(self, _: Request) -> Response:
        """200 while both pools have a ready worker."""
        if self._ready():
            return JSONResponse({"status": "serving"})
        return JSONResponse({"status": "not serving: a pool has no ready worker"}, 503)

    async def metrics(self, _: Request) -> Response:
        """Prometheus' text format."""
        return Response(self._intake.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def completions(self, request: Request) -> Response:
        """Answers to plain prompts."""
        body = await _read(request, CompletionRequest)
        shape = TextShape(*self._shape_of(body.logprobs is not None))
        return await self._respond(request, body, shape)

    async def chat_completions(self, request: Request) -> Response:
        """Answers in a conversation."""
        body = await _read(request, ChatRequest)
        shape = ChatShape(*self._shape_of(body.logprobs))
        return await self._respond(request, body, shape)

    def _shape_of(self, logprobs: bool) -> tuple[str, str, Any, bool]:
        return secrets.token_hex(12), self._intake.model.name, self._intake.model.tokenizer, logprobs

    def _model_card(self) -> Json:
        model = self._intake.model
        return {
            "id": model.name,
            "object": "model",
            "created": 0,
            "owned_by": "kvrelay",
            "max_model_len": model.context,
        }

    async def _respond(
        self, request: Request, body: CompletionRequest | ChatRequest, shape: Shape
    ) -> Response:
        requests = body.requests()
        for number, ask in enumerate(requests):
            ask.request_id = f"{shape.call_id}-{number}"
        choices = [Choice(number) for number in range(len(requests))]
        if body.stream:
            usage = body.stream_options.include_usage
            return _EventStream(self, requests, choices, shape, body.n, usage)

        async def gather(choice: Choice, event: GenerateResponse) -> None:
            choice.take(event)

        await while_connected(request.receive, self.run(requests, choices, gather))
        return JSONResponse(shape.whole(choices, body.n))

    async def run(
        self,
        requests: Sequence[GenerateRequest],
        choices: Sequence[Choice],
        take: Callable[[Choice, GenerateResponse], Awaitable[None]],
    ) -> None:
        """Run all requests of a call beside each other; the first error ends the others."""

        async def run_one(request: GenerateRequest, choice: Choice) -> None:
            await self._intake.generate(request, lambda event: take(choice, event))

        if len(requests) == 1:
            return await run_one(requests[0], choices[0])
        try:
            async with asyncio.TaskGroup() as group:
                for request, choice in zip(requests, choices, strict=True):
                    group.create_task(run_one(request, choice))
        except* KvrelayError as errors:
            raise _first(errors) from None


class _EventStream(Response):
    """Server-sent events; the status waits for the first event, so that early errors have their own."""

    def __init__(
        self,
        door: HttpDoor,
        requests: Sequence[GenerateRequest],
        choices: Sequence[Choice],
        shape: Shape,
        choices_a_prompt: int,
        include_usage: bool,
    ) -> None:
        super().__init__()
        self._door, self._requests, self._choices, self._shape = door, requests, choices, shape
        self._choices_a_prompt, self._include_usage = choices_a_prompt, include_usage
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._stream(send))
        except KvrelayError as error:
            if not self._started:
                await _refusal(error)(scope, receive, send)
            elif not isinstance(error, Cancelled):
                await self._send(send, error_body(error))
                await self._end(send)

    async def _stream(self, send: Send) -> None:
        async def take(choice: Choice, event: GenerateResponse) -> None:
            if event.HasField("finish"):
                choice.finish = event.finish
            chunk = self._shape.chunk(choice, event)
            if chunk is not None:
                await self._send(send, chunk | {"usage": None} if self._include_usage else chunk)

        await self._door.run(self._requests, self._choices, take)
        if self._include_usage:
            await self._send(send, self._shape.usage_chunk(self._choices, self._choices_a_prompt))
        await self._end(send)

    async def _send(self, send: Send, chunk: Json) -> None:
        if not self._started:
            self._started = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        data = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
        await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

    async def _end(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the process that the gateway lives in."""
        yield


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, or drop it when the client goes away.

    Raises:
        Cancelled: the client went away.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Cancelled("the client went away")
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
        await asyncio.wait((working, watching))


async def _read(request: Request, kind: type[Body]) -> Body:
    """The body, checked.

    Raises:
        InvalidArgument: it is no JSON, or not of this kind.
        PromptTooLong: it is larger than any prompt may be.
    """
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > MESSAGE_BYTES:
            raise PromptTooLong(f"the request has more than {MESSAGE_BYTES} bytes")
    try:
        return kind.model_validate_json(bytes(raw))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidArgument(f"{place}: {first['msg']}" if place else first["msg"]) from None


def _first(errors: BaseExceptionGroup[KvrelayError]) -> KvrelayError:
    """One error of a group."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, KvrelayError) else Internal(str(error))


def _refusal(error: KvrelayError) -> Response:
    headers = {} if error.retry_after is None else {"retry-after": str(max(1, round(error.retry_after)))}
    return JSONResponse(error_body(error), error.http, headers)


async def _refuse(_: Request, error: Exception) -> Response:
    return _refusal(error if isinstance(error, KvrelayError) else Internal(str(error)))


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    words = InvalidArgument(f"there is no {request.method} {request.url.path}")
    return JSONResponse(error_body(words), status)
