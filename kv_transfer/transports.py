"""The channels that kvrelay comes with, by URI scheme."""

from kv_transfer.channel import Transport
from kv_transfer.grpc_channel import GrpcChannel
from kv_transfer.redis_channel import RedisChannel
from kv_transfer.redis_store import SCHEMES


def default_transports() -> dict[str, Transport]:
    """What `Channels` is given in a worker; a test adds an `InprocHub`'s channel."""
    return {"grpc": GrpcChannel, **dict.fromkeys(SCHEMES, RedisChannel)}
