from kvrelay.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Lease(_message.Message):
    __slots__ = ("lease_id", "endpoint")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    endpoint: str
    def __init__(self, lease_id: _Optional[str] = ..., endpoint: _Optional[str] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "prompt_tokens", "sampling", "lease")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_tokens: int
    sampling: _sampling_pb2.SamplingParams
    lease: Lease
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ...) -> None: ...

class Admitted(_message.Message):
    __slots__ = ("cached_tokens", "queue_seconds")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    queue_seconds: float
    def __init__(self, cached_tokens: _Optional[int] = ..., queue_seconds: _Optional[float] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("token", "prefill_seconds")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    token: _sampling_pb2.SampledToken
    prefill_seconds: float
    def __init__(self, token: _Optional[_Union[_sampling_pb2.SampledToken, _Mapping]] = ..., prefill_seconds: _Optional[float] = ...) -> None: ...

class HandedOver(_message.Message):
    __slots__ = ("blocks", "bytes", "seconds")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    bytes: int
    seconds: float
    def __init__(self, blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("admitted", "first_token", "handed_over")
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    admitted: Admitted
    first_token: FirstToken
    handed_over: HandedOver
    def __init__(self, admitted: _Optional[_Union[Admitted, _Mapping]] = ..., first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., handed_over: _Optional[_Union[HandedOver, _Mapping]] = ...) -> None: ...
