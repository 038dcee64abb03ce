"""A prefill and a decode worker of the tiny model, over real gRPC, in the test's own process."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import grpc

from decode_service.config import DecodeConfig
from decode_service.worker import DecodeWorker
from kvrelay.rpc import error_of_call
from kvrelay.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, worker_pb2, worker_pb2_grpc
from kvrelay.v1.sampling_pb2 import SampledToken, SamplingParams
from model_runtime.options import DecoderOptions
from prefill_service.config import PrefillConfig
from prefill_service.worker import PrefillWorker

WAIT_SECONDS = 60.0


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; fail when it does not come."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come"
        time.sleep(0.005)


@dataclass
class Answer:
    """What both streams of a request said."""

    tokens: list[SampledToken] = field(default_factory=list[SampledToken])
    messages: int = 0
    """Those of the decode stream that brought tokens."""
    cached: int = 0
    reason: int = 0
    blocks: int = 0
    bytes: int = 0

    @property
    def ids(self) -> list[int]:
        """The answer's token ids."""
        return [token.token_id for token in self.tokens]


class Prefill:
    """A running prefill worker and its stubs."""

    def __init__(self, worker: PrefillWorker) -> None:
        self.worker = worker
        self.address = worker.start()
        self.channel = grpc.insecure_channel(self.address)
        self.service: Any = prefill_pb2_grpc.PrefillServiceStub(self.channel)
        self.admin: Any = worker_pb2_grpc.WorkerServiceStub(self.channel)

    def status(self) -> worker_pb2.GetWorkerStatusResponse:
        """What it says of itself."""
        return self.admin.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest())

    def read(
        self,
        ids: list[int],
        sampling: SamplingParams,
        lease: prefill_pb2.Lease | None = None,
        prompt: int = 0,
    ) -> Any:
        """Open a Prefill stream."""
        request = prefill_pb2.PrefillRequest(
            token_ids=ids, prompt_tokens=prompt or len(ids), sampling=sampling
        )
        if lease is not None:
            request.lease.CopyFrom(lease)
        return self.service.Prefill(request)

    def assert_idle(self) -> None:
        """Nothing runs, and no block is held."""
        until(lambda: self.status().running == self.status().waiting == 0)
        assert self.status().blocks_free == self.status().blocks
        assert self.worker._engine is not None
        self.worker._engine.pool.check_integrity()


class Decode(Prefill):
    """A running decode worker and its stubs."""

    def __init__(self, worker: DecodeWorker) -> None:
        self.worker = worker  # type: ignore[assignment]
        self.address = worker.start()
        self.channel = grpc.insecure_channel(self.address)
        self.service = decode_pb2_grpc.DecodeServiceStub(self.channel)
        self.admin = worker_pb2_grpc.WorkerServiceStub(self.channel)

    def write(self, ids: list[int], sampling: SamplingParams, prompt: int = 0) -> Any:
        """Open a Decode stream."""
        return self.service.Decode(
            decode_pb2.DecodeRequest(token_ids=ids, prompt_tokens=prompt or len(ids), sampling=sampling)
        )


def _split(model: Path, settings: dict[str, Any]) -> tuple[DecoderOptions, dict[str, Any]]:
    """The settings that are about the model, and the others."""
    names = {field.name for field in fields(DecoderOptions)}
    about = {name: value for name, value in settings.items() if name in names}
    rest = {name: value for name, value in settings.items() if name not in names}
    return DecoderOptions(str(model), **{"threads": 1, **about}), rest


@contextmanager
def prefill_worker(model: Path, **settings: Any) -> Iterator[Prefill]:
    """A prefill worker that ends with the context."""
    options, rest = _split(model, {"cache_tokens": 4096, **settings})
    worker = PrefillWorker(PrefillConfig("prefill-0", options, **rest))
    started = Prefill(worker)
    try:
        yield started
    finally:
        started.channel.close()
        worker.stop(0)


@contextmanager
def decode_worker(model: Path, **settings: Any) -> Iterator[Decode]:
    """A decode worker that ends with the context."""
    options, rest = _split(model, {"cache_tokens": 8192, "slots": 8, **settings})
    worker = DecodeWorker(DecodeConfig("decode-0", options, **rest))
    started = Decode(worker)
    try:
        yield started
    finally:
        started.channel.close()
        worker.stop(0)


def relay(
    prefill: Prefill, decode: Decode, ids: list[int], sampling: SamplingParams, prompt: int = 0
) -> Answer:
    """One request through both workers, as the gateway does it; raises the error that ended it."""
    answer = Answer()
    try:
        writing = decode.write(ids, sampling, prompt)
        reserved = next(writing).reserved
        for event in prefill.read(ids, sampling, reserved.lease, prompt):
            if event.HasField("admitted"):
                answer.cached = event.admitted.cached_tokens
            elif event.HasField("first_token"):
                answer.tokens.append(event.first_token.token)
            else:
                answer.blocks, answer.bytes = event.handed_over.blocks, event.handed_over.bytes
        for event in writing:
            answer.tokens.extend(event.tokens.tokens)
            answer.messages += event.HasField("tokens")
            answer.reason = event.finished.reason or answer.reason
    except grpc.RpcError as error:
        raise error_of_call(error) from error
    return answer
