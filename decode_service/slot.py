"""One sequence in a decode worker, from reservation to its last token."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from kv_transfer.landing import Arrival
from kvrelay.errors import KvrelayError
from kvrelay.v1.decode_pb2 import DecodeResponse
from kvrelay.v1.sampling_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, FinishReason, SampledToken
from kvrelay_kernels.quant import BLOCK_TOKENS
from model_runtime.sampler import SamplingConfig

Event = DecodeResponse | KvrelayError | None
"""What a sequence tells its caller: events, then None or one error."""

CAPACITY_TOKENS = 256
"""Capacities are multiples of this, so that graph keys carry few distinct ones."""


@dataclass(eq=False)
class Slot:
    """A sequence: its tokens, its blocks, and how its next token is drawn.

    Other threads than the engine's only set `cancelled`.
    """

    request_id: str
    lease_id: str
    prompt_ids: list[int]
    answer_ids: list[int]
    """Tokens answered so far; those of an earlier attempt at the same request come first."""
    sampling: SamplingConfig
    max_tokens: int
    """Bound on `answer_ids`."""
    emit: Callable[[Event], None]
    cancelled: bool = False
    blocks: list[int] = field(default_factory=list[int])
    arrived: Future[Arrival] | None = None
    """Done when all blocks are in; None before the slot is granted."""
    deadline: float = 0.0
    """`time.monotonic()` after which a granted slot without its blocks is taken back."""
    drawn: list[SampledToken] = field(default_factory=list[SampledToken])
    """Tokens since the last message."""
    begun: bool = False
    """Whether there was a message with tokens: the first one does not wait for others."""
    ahead: int = 0
    """Tokens being drawn behind `answer_ids`, in steps that are under way."""
    landed: int = 0
    """Blocks that were in when the deadline was last moved."""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.answer_ids)

    @property
    def has_next(self) -> bool:
        """Whether a token may follow on those that are being drawn."""
        return len(self.answer_ids) + self.ahead < self.max_tokens

    @property
    def block_count(self) -> int:
        """Blocks of one layer that the sequence may ever fill: its capacity."""
        # The last token drawn is answered, but never read again.
        tokens = len(self.prompt_ids) + self.max_tokens - 1
        return -(-tokens // CAPACITY_TOKENS) * CAPACITY_TOKENS // BLOCK_TOKENS

    def ready(self, now: float) -> bool:
        """Whether a granted slot can join, has failed, or has waited too long."""
        return (self.arrived is not None and self.arrived.done()) or now >= self.deadline

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ends with its newest token; None while it goes on."""
        answered = len(self.answer_ids)
        if answered >= max(1, self.sampling.min_tokens) and self.answer_ids[-1] in self.sampling.ending_ids:
            return FINISH_REASON_STOP
        return FINISH_REASON_LENGTH if answered >= self.max_tokens else None
