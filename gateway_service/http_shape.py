"""How answers look to OpenAI's clients: whole, in chunks, and as errors."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway_service.model import Tokenizer
from kvrelay.errors import BadRequest, KvrelayError, Overloaded
from kvrelay.v1.inference_pb2 import Finish, GenerateResponse, Usage
from kvrelay.v1.sampling_pb2 import FinishReason, SampledToken

Json = dict[str, Any]

REASONS = {FinishReason.FINISH_REASON_STOP: "stop", FinishReason.FINISH_REASON_LENGTH: "length"}


@dataclass
class Choice:
    """One answer of those that a call asked for."""

    index: int
    text: str = ""
    tokens: list[SampledToken] = field(default_factory=list)
    offset: int = 0
    """Characters of the tokens told so far."""
    finish: Finish = field(default_factory=Finish)

    def take(self, event: GenerateResponse) -> None:
        """Gather what an event brings."""
        if event.HasField("delta"):
            self.text += event.delta.text
            self.tokens += event.delta.tokens
        elif event.HasField("finish"):
            self.finish = event.finish


class Shape:
    """What the two endpoints have in common."""

    id_prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self, call_id: str, model: str, tokenizer: Tokenizer, logprobs: bool) -> None:
        self.call_id = f"{self.id_prefix}-{call_id}"
        self._model = model
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._created = int(time.time())

    def opening(self) -> Json | None:
        """What a choice's first chunk says before any text; None: nothing."""
        return None

    def piece(self, text: str) -> Json:
        """The text of a chunk."""
        raise NotImplementedError

    def message(self, text: str) -> Json:
        """The text of a whole answer."""
        raise NotImplementedError

    def token_logprobs(self, tokens: Sequence[SampledToken], choice: Choice) -> Json:
        """Log-probabilities of some tokens of a choice."""
        raise NotImplementedError

    def whole(self, choices: Sequence[Choice], choices_a_prompt: int) -> Json:
        """The answer to a call that does not stream."""
        body = self._body(
            self.whole_object,
            [
                {
                    "index": choice.index,
                    **self.message(choice.text),
                    "logprobs": self._told(choice.tokens, choice),
                    "finish_reason": REASONS.get(choice.finish.reason),
                }
                for choice in choices
            ],
        )
        return body | {"usage": usage_of(choices, choices_a_prompt)}

    def chunk(self, choice: Choice, event: GenerateResponse) -> Json | None:
        """The chunk for an event of a choice; None where there is nothing to say."""
        reason: str | None = None
        tokens: Sequence[SampledToken] = ()
        if event.HasField("prompt"):
            content = self.opening()
        elif event.HasField("delta"):
            tokens = event.delta.tokens
            content = self.piece(event.delta.text) if event.delta.text or self._logprobs else None
        else:
            content, reason = self.piece(""), REASONS.get(event.finish.reason)
        if content is None:
            return None
        told = self._told(tokens, choice)
        return self._body(
            self.chunk_object,
            [{"index": choice.index, **content, "logprobs": told, "finish_reason": reason}],
        )

    def usage_chunk(self, choices: Sequence[Choice], choices_a_prompt: int) -> Json:
        """The last chunk of a stream that was asked for its usage."""
        return self._body(self.chunk_object, []) | {"usage": usage_of(choices, choices_a_prompt)}

    def _told(self, tokens: Sequence[SampledToken], choice: Choice) -> Json | None:
        return self.token_logprobs(tokens, choice) if self._logprobs and tokens else None

    def _body(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.call_id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id, skip_special=False)

    def _text(self, token_id: int) -> str:
        return self._bytes(token_id).decode(errors="replace")


class TextShape(Shape):
    """`/v1/completions`."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def piece(self, text: str) -> Json:
        return {"text": text}

    def message(self, text: str) -> Json:
        return {"text": text}

    def token_logprobs(self, tokens: Sequence[SampledToken], choice: Choice) -> Json:
        texts = [self._text(token.token_id) for token in tokens]
        offsets: list[int] = []
        for text in texts:
            offsets.append(choice.offset)
            choice.offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self._text(top.token_id): top.logprob for top in t.top} for t in tokens],
            "text_offset": offsets,
        }


class ChatShape(Shape):
    """`/v1/chat/completions`."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> Json | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}

    def message(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text}}

    def token_logprobs(self, tokens: Sequence[SampledToken], choice: Choice) -> Json:
        def told(token_id: int, logprob: float) -> Json:
            raw = self._bytes(token_id)
            return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}

        return {
            "content": [
                told(token.token_id, token.logprob)
                | {"top_logprobs": [told(top.token_id, top.logprob) for top in token.top]}
                for token in tokens
            ]
        }


def usage_of(choices: Sequence[Choice], choices_a_prompt: int) -> Json:
    """What a call used: each prompt counts once, however many choices it has."""
    total = Usage()
    for choice in choices:
        total.completion_tokens += choice.finish.usage.completion_tokens
        if choice.index % choices_a_prompt == 0:
            total.prompt_tokens += choice.finish.usage.prompt_tokens
            total.cached_tokens += choice.finish.usage.cached_tokens
    return {
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "total_tokens": total.prompt_tokens + total.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": total.cached_tokens},
    }


def error_body(error: KvrelayError, param: str | None = None) -> Json:
    """An error as OpenAI's clients read it; its code is the leaf's name."""
    kind = "server_error"
    if isinstance(error, BadRequest):
        kind = "invalid_request_error"
    elif isinstance(error, Overloaded):
        kind = "rate_limit_error"
    code = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}
