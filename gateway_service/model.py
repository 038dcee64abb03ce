"""The served model, as far as the gateway needs to know it: its limits, its tokenizer, its chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvrelay.errors import InvalidArgument

from model_runtime.config import ModelConfig


class Tokenizer(Protocol):
    """What `model_runtime.tokenizer` provides."""

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The ids of a text; with `add_special` what the model wants before it (BOS) comes along."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids; invalid bytes become U+FFFD."""
        ...


class ChatTemplate(Protocol):
    """What `model_runtime.chat_template` provides."""

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation, up to where the model's answer begins."""
        ...


@dataclass(frozen=True)
class ServedModel:
    """One model behind one gateway."""

    name: str
    """As requests and the model list call it."""
    config: ModelConfig
    kv_format: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    """None: the model has none, and chats are refused."""

    def encode_text(self, text: str) -> list[int]:
        """The ids of a plain prompt, with what the model wants before it."""
        return self.tokenizer.encode(text)

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """The ids of a conversation of roles and contents, up to where the answer begins.

        Raises:
            InvalidArgument: the model has no template, or its template refuses these messages.
        """
        if self.template is None:
            raise InvalidArgument(f"the model {self.name!r} has no chat template; send text or token ids")
        text = self.template.render([{"role": role, "content": content} for role, content in messages])
        return self.tokenizer.encode(text, add_special=False)

    @property
    def context(self) -> int:
        """Largest number of tokens, prompt and answer together."""
        return self.config.context

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        return self.config.vocabulary
