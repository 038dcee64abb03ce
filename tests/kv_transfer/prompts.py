"""A made-up prompt with random blocks, and the arena that they land in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from time import monotonic, sleep

import numpy as np

from kv_transfer.block import BlockCodec, BlockHeader
from kv_transfer.channel import Sender
from kv_transfer.prefix import prefix_keys
from kvrelay.errors import KvrelayError
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout, parse_format


def small_codec(name: str = "int8", layers: int = 3, kv_heads: int = 2, head_dim: int = 64) -> BlockCodec:
    """The codec of a small cache."""
    return BlockCodec(0xC0FFEE, BlockLayout(parse_format(name, head_dim), kv_heads, head_dim), layers)


@dataclass
class Prompt:
    """`tokens` tokens with blocks of random bytes; `seed` decides all of it."""

    codec: BlockCodec
    tokens: int
    seed: int = 0
    landed: dict[tuple[int, int], bytes] = field(default_factory=dict)
    """What `write` was given."""

    @cached_property
    def keys(self) -> list[bytes]:
        """The prefix key of each block."""
        token_ids = np.random.default_rng(self.seed).integers(0, 50_000, self.tokens)
        return prefix_keys(token_ids, self.codec.model, self.codec.layout.fingerprint)

    @cached_property
    def arena(self) -> dict[tuple[int, int], bytes]:
        """The payload of each (layer, block)."""
        random = np.random.default_rng(self.seed)
        places = [(layer, index) for layer in range(self.codec.layers) for index in range(len(self.keys))]
        return {place: random.bytes(self.codec.layout.block_bytes) for place in places}

    @property
    def expected(self) -> dict[tuple[int, int], bytes]:
        """The arena as it has to land: with zeros behind the last token."""
        return {place: self.wire(*place)[1] for place in self.arena}

    def blocks(self) -> Iterator[tuple[BlockHeader, memoryview]]:
        """All blocks, layer by layer."""
        for layer, index in self.arena:
            yield self.block(layer, index)

    def block(self, layer: int, index: int) -> tuple[BlockHeader, memoryview]:
        """One block as the engine sends it."""
        start = index * BLOCK_TOKENS
        count = min(BLOCK_TOKENS, self.tokens - start)
        header = self.codec.header(layer, start, count, self.keys[index])
        return header, memoryview(self.arena[layer, index])

    def wire(self, layer: int, index: int) -> tuple[bytes, bytes]:
        """One block as the codec writes it: header and payload."""
        head, payload = self.codec.encode(*self.block(layer, index))
        return head, bytes(payload)

    def message(self, layer: int, index: int) -> bytes:
        """One block as it is on the wire."""
        return b"".join(self.wire(layer, index))

    def write(self, layer: int, index: int, payload: memoryview) -> None:
        """What the decode worker registers."""
        self.landed[layer, index] = bytes(payload)

    def send_all(self, sender: Sender) -> None:
        """Send every block."""
        for header, payload in self.blocks():
            sender.send(header, payload)


def outcome(prompt: Prompt, sender: Sender) -> KvrelayError | None:
    """What a sender is told, at a send, at the commit, or by its future; None where all is well."""
    try:
        prompt.send_all(sender)
        error = sender.commit(prompt.tokens, 1).exception(20)
    except KvrelayError as raised:
        return raised
    assert error is None or isinstance(error, KvrelayError)
    return error


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for a condition. Raises TimeoutError."""
    give_up_at = monotonic() + seconds
    while not condition():
        if monotonic() > give_up_at:
            raise TimeoutError("the condition has not come true")
        sleep(0.002)
