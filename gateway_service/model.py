"""The served model, as far as the gateway needs to know it: its limits and its tokenizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from model_runtime.catalog import default_cache_dir, resolve
from model_runtime.checkpoint import load_model
from model_runtime.config import ModelConfig
from model_runtime.progress import Progress, silent
from model_runtime.tokenizer import load_tokenizer


class Detokenizer(Protocol):
    """Tokens of one answer to text."""

    def add(self, token_id: int) -> str:
        """The text that this token completes: whole characters, possibly none."""
        ...


class Tokenizer(Protocol):
    """What is asked of `model_runtime.tokenizer.Tokenizer`."""

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text; `add_special` puts a first token before it where the model wants one."""
        ...

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a conversation, up to where the answer begins; InvalidArgument if there is none."""
        ...

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """The bytes that one token stands for; special tokens have none where they are skipped."""
        ...

    def detokenizer(self) -> Detokenizer:
        """A new incremental decoder, which skips special tokens."""
        ...


@dataclass(frozen=True)
class ServedModel:
    """One model behind one gateway."""

    name: str
    """As requests and the model list call it."""
    config: ModelConfig
    kv_format: str
    tokenizer: Tokenizer

    def encode_text(self, text: str) -> list[int]:
        """The ids of a plain prompt, with what the model wants before it."""
        return self.tokenizer.encode(text)

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """The ids of a conversation of roles and contents, up to where the answer begins.

        Raises:
            InvalidArgument: the model has no chat template, or its template refuses these messages.
        """
        turns = [{"role": role, "content": content} for role, content in messages]
        return self.tokenizer.encode(self.tokenizer.render_chat(turns), add_special=False)

    @property
    def context(self) -> int:
        """Largest number of tokens, prompt and answer together."""
        return self.config.context

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        return self.config.vocabulary


def load_served_model(
    model: str,
    kv_format: str,
    name: str | None = None,
    cache_dir: Path | None = None,
    progress: Progress = silent,
) -> ServedModel:
    """Find (or fetch) a model and load its tokenizer, not its weights; `name` replaces the model's own.

    Raises:
        ModelNotFound, ModelUnreachable, ModelFileInvalid: as `resolve`, `load_model` and `load_tokenizer`.
    """
    cache_dir = cache_dir or default_cache_dir()
    checkpoint = load_model(resolve(model, cache_dir, progress), cache_dir)
    tokenizer = load_tokenizer(checkpoint, cache_dir)
    return ServedModel(name or checkpoint.config.name, checkpoint.config, kv_format, tokenizer)
