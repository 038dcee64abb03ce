"""A client of a running system: what the command line, and any other operator's tool, calls."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from kvrelay.errors import NoWorker
from kvrelay.rpc import CHANNEL_OPTIONS, error_of_call
from kvrelay.v1.control_pb2 import GetStatusRequest, GetStatusResponse, ScaleRequest, ScaleResponse
from kvrelay.v1.control_pb2_grpc import ControlServiceStub
from kvrelay.v1.inference_pb2 import GenerateRequest, GenerateResponse, GetModelRequest, GetModelResponse
from kvrelay.v1.inference_pb2_grpc import InferenceServiceStub

CONNECT_SECONDS = 5.0


class Client:
    """Calls one gateway; every failed call raises its leaf of the error tree."""

    def __init__(self, address: str) -> None:
        self.address = address
        # A proxy of the environment is for the world outside, not for a server that was named here.
        self._channel = grpc.insecure_channel(address, (*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)))
        self._inference: Any = InferenceServiceStub(self._channel)
        self._control: Any = ControlServiceStub(self._channel)

    def connect(self) -> None:
        """See whether a server answers.

        Raises:
            NoWorker: nothing answers there.
        """
        try:
            self._inference.GetModel(GetModelRequest(), timeout=CONNECT_SECONDS)
        except grpc.RpcError:
            raise NoWorker(f"no kvrelay server answers at {self.address}") from None

    def generate(self, request: GenerateRequest) -> Generator[GenerateResponse]:
        """The answer's events; closing the iterator drops the stream."""
        with _leaves():
            call = self._inference.Generate(request)
            try:
                yield from call
            finally:
                call.cancel()

    def model(self) -> GetModelResponse:
        """What is served."""
        with _leaves():
            return self._inference.GetModel(GetModelRequest())

    def status(self) -> GetStatusResponse:
        """What runs."""
        with _leaves():
            return self._control.GetStatus(GetStatusRequest())

    def scale(self, prefill: int | None, decode: int | None) -> ScaleResponse:
        """Have each pool that is named reach its number; returns when that is done."""
        with _leaves():
            return self._control.Scale(ScaleRequest(prefill=prefill, decode=decode))

    def close(self) -> None:
        """Give up the connection."""
        self._channel.close()


@contextmanager
def _leaves() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise error_of_call(error) from None
