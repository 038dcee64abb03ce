"""A gateway with scripted workers behind it, and a client before it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio

from gateway_service.config import GatewayConfig
from gateway_service.directory import WorkerDirectory
from gateway_service.gateway import Gateway
from kvrelay.errors import KvrelayError
from kvrelay.rpc import CHANNEL_OPTIONS, error_of_call
from kvrelay.v1.inference_pb2 import Finish, GenerateRequest, GenerateResponse, PromptInfo
from kvrelay.v1.inference_pb2_grpc import InferenceServiceStub
from tests.gateway_service.byte_model import byte_model
from tests.gateway_service.scripted import Landing, ScriptedDecode, ScriptedPrefill, ScriptedWorker

PATIENCE = 10.0


@dataclass
class Reply:
    """All that came back for one request."""

    events: list[GenerateResponse] = field(default_factory=list)
    error: KvrelayError | None = None

    @property
    def text(self) -> str:
        return "".join(event.delta.text for event in self.events)

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for event in self.events for token in event.delta.tokens]

    @property
    def prompt(self) -> PromptInfo:
        return next(event.prompt for event in self.events if event.HasField("prompt"))

    @property
    def finish(self) -> Finish:
        if self.error is not None:
            raise self.error
        return self.events[-1].finish


@dataclass
class House:
    """What a test walks through."""

    gateway: Gateway
    directory: WorkerDirectory
    prefill: list[ScriptedPrefill]
    decode: list[ScriptedDecode]
    stub: InferenceServiceStub
    channel: grpc.aio.Channel

    @property
    def workers(self) -> list[ScriptedWorker]:
        return [*self.prefill, *self.decode]

    def call(self, request: GenerateRequest) -> "grpc.aio.UnaryStreamCall[GenerateRequest, GenerateResponse]":
        return self.stub.Generate(request)  # type: ignore[return-value]

    async def ask(self, request: GenerateRequest) -> Reply:
        """Send a request and take all that comes back."""
        reply = Reply()
        try:
            async for event in self.call(request):
                reply.events.append(event)
        except grpc.aio.AioRpcError as error:
            reply.error = error_of_call(error)
        return reply

    async def error_of(self, request: GenerateRequest) -> KvrelayError:
        """The error that a request ends with."""
        reply = await self.ask(request)
        assert reply.error is not None, f"answered {reply.text!r}"
        return reply.error

    async def idle(self) -> None:
        """Wait until nothing is held anywhere; fails where something stays."""
        await until(
            lambda: (
                all(worker.open_streams == 0 for worker in self.workers)
                and all(self.directory.in_flight(worker.worker_id) == 0 for worker in self.workers)
                and self.gateway.running == 0
                and self.gateway.queued == 0
            ),
            lambda: str(
                [(w.worker_id, w.open_streams, self.directory.in_flight(w.worker_id)) for w in self.workers]
            ),
        )

    def add(self, worker: ScriptedWorker) -> None:
        self.directory.add(worker.pool, worker.worker_id, worker.address)


async def until(condition: Callable[[], bool], explain: Callable[[], str] = str) -> None:
    """Wait for a condition."""
    try:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"still not so after {PATIENCE} s: {explain()}") from None


@asynccontextmanager
async def open_house(
    prefill: int = 1,
    decode: int = 1,
    config: GatewayConfig | None = None,
    slots: int = 4,
) -> AsyncIterator[House]:
    """Start workers and a gateway, and check at the end that nothing is held."""
    config = config or GatewayConfig(poll_seconds=0.05, worker_wait_seconds=2.0)
    directory = WorkerDirectory(config.poll_seconds, config.lost_seconds)
    landings: dict[str, Landing] = {}
    gateway = Gateway(config, byte_model(), directory)
    await gateway.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{gateway.port}", options=CHANNEL_OPTIONS)
    house = House(
        gateway,
        directory,
        [ScriptedPrefill(f"prefill-{n}", landings, slots=slots) for n in range(prefill)],
        [ScriptedDecode(f"decode-{n}", landings, slots=slots) for n in range(decode)],
        InferenceServiceStub(channel),
        channel,
    )
    try:
        for worker in house.workers:
            await worker.start()
            house.add(worker)
        if prefill and decode:
            await until(lambda: gateway.ready)
        yield house
        await house.idle()
    finally:
        await channel.close()
        await gateway.stop(0)
        for worker in house.workers:
            await worker.stop()
