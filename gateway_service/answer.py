"""The answer of one request: its tokens, its text, and where it ends, whichever workers draw it."""

from collections.abc import Sequence

from gateway_service.model import Detokenizer
from gateway_service.text import StopStrings
from kvrelay.v1.inference_pb2 import TokenDelta
from kvrelay.v1.sampling_pb2 import FinishReason, SampledToken, SamplingParams

STOP, LENGTH = FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH


class Answer:
    """Grows token by token until a stop id, a stop string or a limit ends it.

    Text comes in whole characters: the bytes of one that the end cuts off are left out.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        stop_ids: Sequence[int],
        context: int,
        detokenizer: Detokenizer,
    ) -> None:
        """`stop_ids` are the model's own; `detokenizer` is new, and skips special tokens."""
        self.token_ids = list(prompt)
        """Prompt, and behind it the answer so far."""
        self.prompt_tokens = len(prompt)
        self.reason: FinishReason | None = None
        """Why the answer has ended."""
        self._limit = min(sampling.max_tokens or context, context - len(prompt))
        self._min_tokens = sampling.min_tokens
        self._stop_ids = frozenset(sampling.stop_ids)
        if not sampling.ignore_eos:
            self._stop_ids |= frozenset(stop_ids)
        self._text = detokenizer
        self._stops = StopStrings(sampling.stop)

    @property
    def tokens(self) -> int:
        """Tokens answered so far."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self._limit - self.tokens

    @property
    def stop(self) -> str:
        """The stop string that ended the answer; empty if none did."""
        return self._stops.hit or ""

    def limit_to(self, left: int) -> None:
        """A worker has room for no more than `left` further tokens."""
        self._limit = min(self._limit, self.tokens + left)

    def add(self, tokens: Sequence[SampledToken]) -> TokenDelta:
        """Take drawn tokens, up to the one that ends the answer, and give what is new for the client."""
        text = ""
        for count, token in enumerate(tokens, 1):
            self.token_ids.append(token.token_id)
            if token.token_id in self._stop_ids and self.tokens >= self._min_tokens:
                self.reason = STOP  # a stop id has no text
            else:
                piece = self._text.add(token.token_id)
                text += self._stops.push(piece, self.tokens >= self._min_tokens)
                if self._stops.hit is not None:
                    self.reason = STOP
            if self.reason is None and self.left <= 0:
                self.reason = LENGTH
            if self.reason is not None:
                return TokenDelta(text=text + self._stops.flush(), tokens=tokens[:count])
        return TokenDelta(text=text, tokens=tokens)

    def end(self, reason: FinishReason) -> str:
        """A worker has ended the answer; gives the text that was held back."""
        self.reason = reason
        return self._stops.flush()
