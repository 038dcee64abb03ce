"""One prompt on its way through a prefill worker."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kv_transfer.channel import Sender
from kvrelay.errors import KvrelayError
from kvrelay.v1.prefill_pb2 import PrefillResponse
from kvrelay_kernels.quant import BLOCK_TOKENS
from model_runtime.sampler import SamplingConfig

Event = PrefillResponse | KvrelayError | None
"""What a job tells its caller: events, then None or one error."""


@dataclass(eq=False)
class PrefillJob:
    """A prompt, what was computed of it, and where its blocks go.

    Other threads than the engine's only set `cancelled`.
    """

    request_id: str
    token_ids: NDArray[np.int32]
    prompt_tokens: int
    """How many of `token_ids` are the prompt; the others were answered before a fault."""
    sampling: SamplingConfig
    sender: Sender | None
    """None: only the first token is wanted."""
    emit: Callable[[Event], None]
    queued_at: float
    """`time.monotonic()` of its arrival."""
    keys: Sequence[bytes] = ()
    """Prefix keys of the blocks, the partly filled last one included."""
    cancelled: bool = False
    error: KvrelayError | None = None
    """What its hand-over failed with, until the engine ends it."""
    admitted_at: float = 0.0
    blocks: list[int] = field(default_factory=list[int])
    computed: int = 0
    """Tokens whose keys and values are in the arena."""

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.token_ids) - self.computed

    @property
    def block_count(self) -> int:
        """Blocks of one layer that the prompt fills."""
        return -(-len(self.token_ids) // BLOCK_TOKENS)

    @property
    def shareable_keys(self) -> Sequence[bytes]:
        """Keys of the blocks that need not be computed when they are found.

        At least the last token is computed: the prompt is read for its logits.
        """
        return self.keys[: (len(self.token_ids) - 1) // BLOCK_TOKENS]
