from kvrelay.v1 import prefill_pb2 as _prefill_pb2
from kvrelay.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DecodeRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "prompt_tokens", "sampling")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_tokens: int
    sampling: _sampling_pb2.SamplingParams
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("lease", "max_tokens")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    lease: _prefill_pb2.Lease
    max_tokens: int
    def __init__(self, lease: _Optional[_Union[_prefill_pb2.Lease, _Mapping]] = ..., max_tokens: _Optional[int] = ...) -> None: ...

class Joined(_message.Message):
    __slots__ = ("blocks", "bytes")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    bytes: int
    def __init__(self, blocks: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class DecodedTokens(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[_sampling_pb2.SampledToken]
    def __init__(self, tokens: _Optional[_Iterable[_Union[_sampling_pb2.SampledToken, _Mapping]]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: _sampling_pb2.FinishReason
    def __init__(self, reason: _Optional[_Union[_sampling_pb2.FinishReason, str]] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("reserved", "joined", "tokens", "finished")
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    reserved: Reserved
    joined: Joined
    tokens: DecodedTokens
    finished: Finished
    def __init__(self, reserved: _Optional[_Union[Reserved, _Mapping]] = ..., joined: _Optional[_Union[Joined, _Mapping]] = ..., tokens: _Optional[_Union[DecodedTokens, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...
