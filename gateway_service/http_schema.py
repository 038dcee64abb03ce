"""What OpenAI's clients send, and what it means in kvrelay's own terms."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvrelay.v1.inference_pb2 import Chat, ChatMessage, GenerateRequest, TokenIds
from kvrelay.v1.sampling_pb2 import SamplingParams

MAX_CHOICES = 16
MAX_PROMPTS = 64

Count = Annotated[int, Field(ge=0, lt=2**32)]
Ids = Annotated[list[Count], Field(min_length=1)]


class Part(BaseModel):
    """One object of a request: what is unknown is refused, and null means absent."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return (
            {key: value for key, value in data.items() if value is not None}
            if isinstance(data, dict)
            else data
        )


class StreamOptions(Part):
    """What a stream carries besides text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextPart(Part):
    """One piece of a message; images and audio are not taken."""

    type: Literal["text"]
    text: str


class Message(Part):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    name: str = ""

    @property
    def text(self) -> str:
        """The content in one piece."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ResponseFormat(Part):
    """Free text is the only format."""

    type: Literal["text"]


class Options(Part):
    """What both endpoints take; the second group is vLLM's, the last has no meaning here."""

    model: str = ""
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] = Field(default_factory=list)

    top_k: int | None = Field(None, ge=-1, lt=2**32)
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Count | None = None
    stop_token_ids: list[Count] = Field(default_factory=list)
    ignore_eos: bool = False

    logit_bias: dict[str, float] = Field(default_factory=dict, max_length=0)
    user: str = ""
    metadata: dict[str, str] = Field(default_factory=dict)
    store: bool = False
    service_tier: str = ""
    safety_identifier: str = ""
    prompt_cache_key: str = ""

    def sampling(self, choice: int, logprobs: int | None, max_tokens: int | None) -> SamplingParams:
        """The parameters of one choice; with a seed, each choice has its own."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=None if self.top_k is None else max(0, self.top_k),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed is None else (self.seed + choice) % 2**64,
            stop_ids=self.stop_token_ids,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            logprobs=logprobs,
            ignore_eos=self.ignore_eos,
        )


class CompletionRequest(Options):
    """The body of `/v1/completions`."""

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Count | None = 16
    logprobs: Count | None = None
    echo: Literal[False] = False
    best_of: Literal[1] = 1

    def requests(self) -> list[GenerateRequest]:
        """One request a choice: all choices of the first prompt, then of the next."""
        prompts = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if isinstance(prompts[0], int):
            prompts = [prompts]
        requests: list[GenerateRequest] = []
        for prompt in prompts:
            for choice in range(self.n):
                request = GenerateRequest(
                    model=self.model, sampling=self.sampling(choice, self.logprobs, self.max_tokens)
                )
                if isinstance(prompt, str):
                    request.text = prompt
                else:
                    request.token_ids.CopyFrom(TokenIds(ids=prompt))  # type: ignore[arg-type]
                requests.append(request)
        return requests


class ChatRequest(Options):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Count = 0
    response_format: ResponseFormat = ResponseFormat(type="text")
    tools: list[Any] = Field(default_factory=list, max_length=0)
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = False

    def requests(self) -> list[GenerateRequest]:
        """One request a choice."""
        chat = Chat(
            messages=[
                # Templates know the older name of the same role.
                ChatMessage(role="system" if turn.role == "developer" else turn.role, content=turn.text)
                for turn in self.messages
            ]
        )
        logprobs = self.top_logprobs if self.logprobs else None
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return [
            GenerateRequest(model=self.model, chat=chat, sampling=self.sampling(choice, logprobs, max_tokens))
            for choice in range(self.n)
        ]
