"""Text to tokens and back, with the tokenizer and chat template of the model's own files."""

import codecs
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders

from kvrelay.errors import InvalidArgument, ModelFileInvalid
from model_runtime.chat_template import ChatTemplate
from model_runtime.token_bytes import TokenBytes, byte_level_bytes, spm_bytes
from model_runtime.weights import Checkpoint


def load_tokenizer(checkpoint: Checkpoint, cache_dir: Path | None = None) -> "Tokenizer":
    """The tokenizer of a model; `cache_dir` keeps what takes long to work out.

    Raises:
        ModelFileInvalid: the vocabulary is missing, broken or of an unknown kind.
    """
    return Tokenizer(checkpoint, checkpoint.tokenizer.load(cache_dir))


class Tokenizer:
    """A model's tokenizer; safe to use from several threads."""

    def __init__(self, checkpoint: Checkpoint, library: tokenizers.Tokenizer) -> None:
        self._library = library
        self._library.no_truncation()
        self._library.no_padding()
        self._template_source = checkpoint.tokenizer.chat_template
        self._special_texts = checkpoint.tokenizer.special
        self._template: ChatTemplate | None = None
        self._name = checkpoint.config.name
        added = library.get_added_tokens_decoder()
        self._added = {token: entry.content for token, entry in added.items()}
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        """Tokens that are not text, such as turn markers."""
        self.bos_id = checkpoint.config.bos_id
        self.stop_ids = checkpoint.config.stop_ids
        """Tokens that end an answer."""
        self.vocabulary = checkpoint.config.vocabulary
        """Number of logits; ids from `library` size to here stand for nothing."""
        self._bytes = _byte_rule(library, self._name)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text; `add_special` puts a first token before it where the model wants one.

        Special tokens written out in the text become those tokens; rendered chats rely on it.

        Raises:
            InvalidArgument: the text holds lone surrogates, which no UTF-8 can say, or a special token
                that the model has no embedding for, such as one that stands for an image.
        """
        try:
            # The library keeps the interpreter's lock in `encode`, and lets go of it in `encode_batch`.
            ids = self._library.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidArgument(f"the text is not valid Unicode: {error}") from error
        if max(ids, default=0) >= self.vocabulary:
            token = self._library.id_to_token(max(ids))
            raise InvalidArgument(f"the text holds {token!r}, which this model cannot read")
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of some tokens; bytes that are not UTF-8 become U+FFFD.

        Raises:
            InvalidArgument: an id is outside the vocabulary.
        """
        return b"".join(self.token_bytes(token, skip_special) for token in ids).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        """The text of one token, special tokens written out; parts of a character become U+FFFD."""
        return self.token_bytes(token_id, skip_special=False).decode("utf-8", "replace")

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """The bytes that a token stands for.

        Raises:
            InvalidArgument: the id is outside the vocabulary.
        """
        if skip_special and token_id in self.special_ids:
            return b""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._library.id_to_token(token_id) if 0 <= token_id < self.vocabulary else None
        if token is None:
            if 0 <= token_id < self.vocabulary:
                return b""  # Rows of the embedding beyond the vocabulary, there to round its size up.
            raise InvalidArgument(f"token id {token_id} is outside the vocabulary of {self.vocabulary}")
        return self._bytes(token)

    def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation; encode it with `add_special=False`.

        Raises:
            InvalidArgument: the model has no chat template, or its template refuses the messages.
        """
        if self._template_source is None:
            raise InvalidArgument(
                f"{self._name} is a base model without a chat template: send text, not messages"
            )
        if self._template is None:
            self._template = ChatTemplate(self._template_source, self._special_texts)
        return self._template.render(messages, add_generation_prompt)

    def detokenizer(self, skip_special: bool = True) -> "Detokenizer":
        """A new incremental decoder, for one answer."""
        return Detokenizer(self, skip_special)


class Detokenizer:
    """Tokens of one answer to text, piece by piece; a character comes out when its last byte is in."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """The text that this token completes, possibly none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id, self._skip_special))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed, or nothing."""
        return self._decoder.decode(b"", final=True)


def _byte_rule(library: tokenizers.Tokenizer, name: str) -> TokenBytes:
    """How this tokenizer writes bytes in its tokens, by its decoder."""
    if isinstance(library.decoder, decoders.ByteLevel):
        return byte_level_bytes()
    if isinstance(library.decoder, decoders.Sequence) and "ByteFallback" in repr(library.decoder):
        return spm_bytes
    raise ModelFileInvalid(f"{name}: tokenizers with the decoder {library.decoder!r:.80} are not supported")
