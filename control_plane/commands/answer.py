"""One answer of a system: its events read to the end, its text handed on as it comes, its figures kept."""

from collections.abc import Callable, Iterator
from typing import Any

from kvrelay.errors import InvalidArgument
from kvrelay.v1.inference_pb2 import Chat, ChatMessage, Finish, GenerateRequest, GenerateResponse, PromptInfo
from kvrelay.v1.sampling_pb2 import FinishReason, SampledToken, SamplingParams

REASONS = {FinishReason.FINISH_REASON_STOP: "stop", FinishReason.FINISH_REASON_LENGTH: "length"}


class Answer:
    """What has come of an answer."""

    def __init__(self) -> None:
        self.request_id = ""
        self.prompt = PromptInfo()
        self.text = ""
        self.tokens: list[SampledToken] = []
        self.finish = Finish()

    def read(self, events: Iterator[GenerateResponse], hear: Callable[[str], None]) -> None:
        """Take all events; `hear` gets each new piece of text."""
        for event in events:
            self.request_id = event.request_id or self.request_id
            if event.HasField("prompt"):
                self.prompt = event.prompt
            elif event.HasField("delta"):
                self.text += event.delta.text
                self.tokens.extend(event.delta.tokens)
                hear(event.delta.text)
            elif event.HasField("finish"):
                self.finish = event.finish

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens behind the first one; 0 where there is none."""
        timing = self.finish.timing
        seconds = timing.total_seconds - timing.time_to_first_token_seconds
        return (len(self.tokens) - 1) / seconds if len(self.tokens) > 1 and seconds > 0 else 0.0

    @property
    def line(self) -> str:
        """The figures, for a person."""
        timing = self.finish.timing
        moved = f"{timing.blocks_moved} blocks moved, {timing.bytes_moved:,} bytes on the wire"
        return (
            f"first token after {timing.time_to_first_token_seconds:.3f} s, {len(self.tokens)} tokens at "
            f"{self.tokens_per_second:.1f} tok/s, {moved} "
            f"({self.prompt.prefill_worker or '-'} to {self.prompt.decode_worker or '-'})"
        )

    @property
    def as_json(self) -> dict[str, Any]:
        """All of it, by plain names."""
        usage, timing = self.finish.usage, self.finish.timing
        found = {
            "request_id": self.request_id,
            "text": self.text,
            "token_ids": [token.token_id for token in self.tokens],
            "finish_reason": REASONS.get(self.finish.reason),
            "stop": self.finish.stop or None,
            "seed": self.prompt.seed,
            "usage": {field: getattr(usage, field) for field in usage.DESCRIPTOR.fields_by_name},
            "timing": {field: getattr(timing, field) for field in timing.DESCRIPTOR.fields_by_name},
            "workers": {"prefill": self.prompt.prefill_worker, "decode": self.prompt.decode_worker},
        }
        if any(token.HasField("logprob") for token in self.tokens):
            found["logprobs"] = [
                {
                    "token_id": token.token_id,
                    "logprob": token.logprob,
                    "top": [{"token_id": top.token_id, "logprob": top.logprob} for top in token.top],
                }
                for token in self.tokens
            ]
        return found


def chat_request(messages: list[tuple[str, str]], sampling: SamplingParams) -> GenerateRequest:
    """A request for the next message of a conversation of (role, content)."""
    try:
        chat = Chat(messages=[ChatMessage(role=role, content=content) for role, content in messages])
    except (ValueError, UnicodeError) as error:
        raise InvalidArgument(f"the prompt is not valid text: {error}") from error
    return GenerateRequest(chat=chat, sampling=sampling)


def text_request(text: str, sampling: SamplingParams) -> GenerateRequest:
    """A request for what follows a text."""
    try:
        return GenerateRequest(text=text, sampling=sampling)
    except (ValueError, UnicodeError) as error:
        raise InvalidArgument(f"the prompt is not valid text: {error}") from error
