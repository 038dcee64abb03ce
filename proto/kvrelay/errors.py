"""The one error tree of kvrelay: each leaf has one gRPC code and one HTTP code.

KvrelayError
├── BadRequest           the client must change something
│   ├── InvalidArgument  INVALID_ARGUMENT    400  a field has a wrong type or value, an empty prompt
│   ├── PromptTooLong    INVALID_ARGUMENT    413  more tokens or bytes than the context or limit allows
│   └── ModelNotFound    NOT_FOUND           404  the model asked for is not served here
├── Overloaded           the client may try again later
│   └── QueueFull        RESOURCE_EXHAUSTED  429  the queue is at its bound; carries a retry hint
├── Unavailable          something that a request needs is gone
│   ├── NoWorker         UNAVAILABLE         503  no worker of a pool is ready, or all that were tried failed
│   ├── Draining         UNAVAILABLE         503  this worker takes no new request
│   └── TransportLost    UNAVAILABLE         503  the channel between the pools (gRPC peer, Redis) is gone
├── BadBlock             a block that came is not what was agreed
│   ├── BlockCorrupt     DATA_LOSS           502  magic, checksum, length or count is wrong
│   └── BlockMismatch    FAILED_PRECONDITION 502  version, model or layout is another one
├── LeaseLost            ABORTED             503  the lease is unknown, was released, or ran out
├── Cancelled            CANCELLED           499  the client dropped the stream
├── BadModel             a model file cannot be used
│   ├── ModelFileInvalid FAILED_PRECONDITION 422  broken, truncated, or of an unknown architecture
│   └── ModelUnreachable UNAVAILABLE         503  it cannot be fetched from here
├── BadSetup             FAILED_PRECONDITION 500  a setting, port, device or library is not usable
└── Internal             INTERNAL            500  a fault of kvrelay's own, non-finite activations included

Over gRPC the leaf's name travels in the trailing metadata `kvrelay-error`, the retry hint in
`kvrelay-retry-after` (seconds).
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import grpc

ERROR_KEY = "kvrelay-error"
RETRY_KEY = "kvrelay-retry-after"


class KvrelayError(Exception):
    """Root of the tree; only its leaves are raised."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http: ClassVar[int] = 500

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which another try makes sense; None: no hint."""

    @property
    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        """What a servicer sends behind the status, so that `error_of_status` can rebuild the leaf."""
        hint = () if self.retry_after is None else ((RETRY_KEY, f"{self.retry_after:.3f}"),)
        return ((ERROR_KEY, type(self).__name__), *hint)


class BadRequest(KvrelayError):
    """The client must change something."""


class InvalidArgument(BadRequest):
    """A field has a wrong type or value."""

    code, http = grpc.StatusCode.INVALID_ARGUMENT, 400


class PromptTooLong(BadRequest):
    """More tokens or bytes than the context or a limit allows."""

    code, http = grpc.StatusCode.INVALID_ARGUMENT, 413


class ModelNotFound(BadRequest):
    """The model asked for is not served here."""

    code, http = grpc.StatusCode.NOT_FOUND, 404


class Overloaded(KvrelayError):
    """The client may try again later."""


class QueueFull(Overloaded):
    """The queue is at its bound."""

    code, http = grpc.StatusCode.RESOURCE_EXHAUSTED, 429


class Unavailable(KvrelayError):
    """Something that a request needs is gone."""


class NoWorker(Unavailable):
    """No worker of a pool is ready, or all that were tried failed."""

    code, http = grpc.StatusCode.UNAVAILABLE, 503


class Draining(Unavailable):
    """This worker takes no new request."""

    code, http = grpc.StatusCode.UNAVAILABLE, 503


class TransportLost(Unavailable):
    """The channel between the pools is gone."""

    code, http = grpc.StatusCode.UNAVAILABLE, 503


class BadBlock(KvrelayError):
    """A block that came is not what was agreed."""


class BlockCorrupt(BadBlock):
    """Magic, checksum, length or count is wrong."""

    code, http = grpc.StatusCode.DATA_LOSS, 502


class BlockMismatch(BadBlock):
    """Version, model or layout is another one."""

    code, http = grpc.StatusCode.FAILED_PRECONDITION, 502


class LeaseLost(KvrelayError):
    """The lease is unknown, was released, or ran out."""

    code, http = grpc.StatusCode.ABORTED, 503


class Cancelled(KvrelayError):
    """The client dropped the stream."""

    code, http = grpc.StatusCode.CANCELLED, 499


class BadModel(KvrelayError):
    """A model file cannot be used."""


class ModelFileInvalid(BadModel):
    """Broken, truncated, or of an unknown architecture."""

    code, http = grpc.StatusCode.FAILED_PRECONDITION, 422


class ModelUnreachable(BadModel):
    """It cannot be fetched from here."""

    code, http = grpc.StatusCode.UNAVAILABLE, 503


class BadSetup(KvrelayError):
    """A setting, port, device or library is not usable."""

    code, http = grpc.StatusCode.FAILED_PRECONDITION, 500


class Internal(KvrelayError):
    """A fault of kvrelay's own."""


def leaves(root: type[KvrelayError] = KvrelayError) -> Iterator[type[KvrelayError]]:
    """The classes below `root` that nothing derives from."""
    children = root.__subclasses__()
    if not children:
        yield root
    for child in children:
        yield from leaves(child)


def error_of_status(
    code: grpc.StatusCode, details: str | None, trailing: Sequence[tuple[str, str | bytes]]
) -> KvrelayError:
    """The leaf that a failed call's status stands for; the nearest one where no kvrelay server sent it."""
    metadata = {key: value for key, value in trailing if isinstance(value, str)}
    hint = metadata.get(RETRY_KEY)
    by_name = {leaf.__name__: leaf for leaf in leaves()}
    nearest = {
        grpc.StatusCode.UNAVAILABLE: NoWorker,
        grpc.StatusCode.CANCELLED: Cancelled,
        grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
        grpc.StatusCode.RESOURCE_EXHAUSTED: QueueFull,
    }
    leaf = by_name.get(metadata.get(ERROR_KEY, ""), nearest.get(code, Internal))
    return leaf(details or code.name, float(hint) if hint else None)
