"""Both ends of each transport, and a real Redis-protocol server."""

from collections.abc import Iterator

import pytest

from kv_transfer.block import BlockCodec
from kv_transfer.embedded import EmbeddedServer
from tests.kv_transfer.prompts import small_codec
from tests.kv_transfer.routes import Route, open_route


@pytest.fixture
def codec() -> BlockCodec:
    """The codec of a small int8 cache."""
    return small_codec()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedServer]:
    """A server for all tests that do not end it."""
    server = EmbeddedServer()
    yield server
    server.stop()


@pytest.fixture(params=["grpc", "redis", "inproc"])
def route(request: pytest.FixtureRequest, codec: BlockCodec, redis_server: EmbeddedServer) -> Iterator[Route]:
    """A decode worker that receives, over each transport in turn."""
    with open_route(request.param, codec, redis_server) as route:
        yield route
