"""What a request may contain; everything else is refused here, before it costs anything."""

import math
import secrets
from collections.abc import Callable, Iterator, Sequence

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from gateway_service.model import ServedModel
from kvrelay.errors import InvalidArgument, ModelNotFound, PromptTooLong
from kvrelay.v1.inference_pb2 import Chat, GenerateRequest
from kvrelay.v1.sampling_pb2 import SamplingParams

ROLES = ("system", "user", "assistant", "tool")
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 256
MAX_REQUEST_ID_CHARS = 128

Bound = tuple[Callable[[float], bool], str]

NUMBERS: dict[str, Bound] = {
    "temperature": (lambda value: value >= 0, "at least 0"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    "repetition_penalty": (lambda value: value > 0, "above 0"),
    "presence_penalty": (lambda value: -2 <= value <= 2, "between -2 and 2"),
    "frequency_penalty": (lambda value: -2 <= value <= 2, "between -2 and 2"),
}


def check_fields(message: Message) -> None:
    """Refuse fields that this version does not know, at any depth: the answer would be to another question.

    Raises:
        InvalidArgument: there is one.
    """
    for part in _messages(message):
        unknown = UnknownFieldSet(part)
        if len(unknown):
            numbers = ", ".join(sorted({str(field.field_number) for field in unknown}))
            raise InvalidArgument(f"{part.DESCRIPTOR.name} has no field {numbers}")


def check_request(request: GenerateRequest, model: ServedModel, max_prompt_bytes: int) -> None:
    """Check all that can be checked before the prompt is tokenized.

    Raises:
        InvalidArgument, ModelNotFound, PromptTooLong: as their docstrings say.
    """
    check_fields(request)
    check_request_id(request.request_id)
    if request.model:
        check_model(request.model, model)
    check_sampling(request.sampling, model.vocabulary)
    kind = request.WhichOneof("prompt")
    if kind == "text":
        check_text(request.text, max_prompt_bytes)
    elif kind == "token_ids":
        _check_ids(request.token_ids.ids, model)
    elif kind == "chat":
        check_chat(request.chat, max_prompt_bytes)
    else:
        raise InvalidArgument("a prompt is missing: text, token_ids or chat")


def check_model(name: str, model: ServedModel) -> None:
    """There is one model, and a request that names another is not for it."""
    if name != model.name:
        raise ModelNotFound(f"the model {name[:100]!r} is not served here; {model.name!r} is")


def check_request_id(request_id: str) -> None:
    """A request id goes into every log line, so it is one short printable word or line."""
    if len(request_id) > MAX_REQUEST_ID_CHARS or not request_id.isprintable():
        raise InvalidArgument(f"request_id must be printable and at most {MAX_REQUEST_ID_CHARS} characters")


def check_text(text: str, max_prompt_bytes: int) -> None:
    """A prompt of text: not empty, and not longer than is worth tokenizing."""
    if not text:
        raise InvalidArgument("the prompt is empty")
    _check_bytes(len(text.encode()), max_prompt_bytes)


def check_chat(chat: Chat, max_prompt_bytes: int) -> None:
    """A prompt of messages: at least one, with roles that templates know."""
    if not chat.messages:
        raise InvalidArgument("the chat has no messages")
    for message in chat.messages:
        if message.role not in ROLES:
            raise InvalidArgument(f"unknown role {message.role[:40]!r}; known are {', '.join(ROLES)}")
    _check_bytes(sum(len(message.content.encode()) for message in chat.messages), max_prompt_bytes)


def check_sampling(sampling: SamplingParams, vocabulary: int) -> None:
    """Check the sampling fields, each alone and min_tokens against max_tokens."""
    for name, (holds, words) in NUMBERS.items():
        if sampling.HasField(name):
            value = getattr(sampling, name)
            if not math.isfinite(value) or not holds(value):
                raise InvalidArgument(f"{name} must be {words}, not {value:g}")
    if sampling.HasField("max_tokens") and sampling.max_tokens == 0:
        raise InvalidArgument("max_tokens must be at least 1")
    if sampling.HasField("max_tokens") and sampling.min_tokens > sampling.max_tokens:
        raise InvalidArgument(f"min_tokens {sampling.min_tokens} is above max_tokens {sampling.max_tokens}")
    if sampling.logprobs > MAX_LOGPROBS:
        raise InvalidArgument(f"logprobs must be at most {MAX_LOGPROBS}, not {sampling.logprobs}")
    if len(sampling.stop_ids) > MAX_STOP_IDS:
        raise InvalidArgument(f"at most {MAX_STOP_IDS} stop_ids are taken, not {len(sampling.stop_ids)}")
    for token_id in sampling.stop_ids:
        if token_id >= vocabulary:
            raise InvalidArgument(f"stop id {token_id} is outside the vocabulary of {vocabulary}")
    if len(sampling.stop) > MAX_STOPS:
        raise InvalidArgument(f"at most {MAX_STOPS} stop strings are taken, not {len(sampling.stop)}")
    for stop in sampling.stop:
        if not 0 < len(stop) <= MAX_STOP_CHARS:
            raise InvalidArgument(f"a stop string has 1 to {MAX_STOP_CHARS} characters, not {len(stop)}")


def check_length(prompt_tokens: int, sampling: SamplingParams, context: int) -> None:
    """Check prompt and answer against the context; nothing is cut short in silence.

    Raises:
        PromptTooLong: the prompt leaves no room for a token.
        InvalidArgument: max_tokens or min_tokens is beyond the room that it leaves.
    """
    left = context - prompt_tokens
    if prompt_tokens == 0:
        raise InvalidArgument("the prompt is empty")
    if left < 1:
        raise PromptTooLong(
            f"the prompt has {prompt_tokens} tokens; the context of {context} needs room for one more"
        )
    for name in ("max_tokens", "min_tokens"):
        asked = getattr(sampling, name)
        if asked > left:
            raise InvalidArgument(
                f"{name} {asked} is too large: the context of {context} leaves {left} behind a prompt of "
                f"{prompt_tokens} tokens"
            )


def resolved(sampling: SamplingParams) -> SamplingParams:
    """A copy with a seed, so that every worker that takes part draws the same tokens."""
    params = SamplingParams()
    params.CopyFrom(sampling)
    if not params.HasField("seed"):
        params.seed = secrets.randbits(63)
    return params


def _check_ids(token_ids: Sequence[int], model: ServedModel) -> None:
    if not token_ids:
        raise InvalidArgument("the prompt is empty")
    if len(token_ids) >= model.context:
        raise PromptTooLong(
            f"the prompt has {len(token_ids)} tokens; the context of {model.context} needs room for one more"
        )
    if max(token_ids) >= model.vocabulary:
        raise InvalidArgument(f"token id {max(token_ids)} is outside the vocabulary of {model.vocabulary}")


def _check_bytes(size: int, limit: int) -> None:
    if size > limit:
        raise PromptTooLong(f"the prompt has {size} bytes; at most {limit} are taken")


def _messages(message: Message) -> Iterator[Message]:
    """A message and all that it contains."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in (value,) if isinstance(value, Message) else value:
                yield from _messages(part)
