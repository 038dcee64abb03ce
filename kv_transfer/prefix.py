"""Names of KV blocks by content: a key stands for a block's tokens and all tokens before them."""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvrelay_kernels.quant import BLOCK_TOKENS

_ROOT = struct.Struct("<16sQQ")
_COUNT = struct.Struct("<I")


def prefix_keys(
    token_ids: Sequence[int] | NDArray[Any], model: int, layout: int, prompt_tokens: int | None = None
) -> list[bytes]:
    """The 16-byte key of each block of 64 tokens, the last of which may be partly filled.

    key[i] = xxh3-128(key[i-1], number of tokens, tokens of block i as little-endian u32), and the chain
    begins at a hash of both fingerprints: two keys are equal where model, layout and every token up
    to the block's end are equal, and a partly filled block never shares the key of a full one.

    Args:
        token_ids: `[n]`, each below 2**32.
        model: the model's fingerprint.
        layout: `BlockLayout.fingerprint`.
        prompt_tokens: how many of the tokens are the prompt (None: all). The others were written one by one,
            which may sum in another order than reading does: a block with some of them has a key of its own.
    """
    tokens = np.asarray(token_ids, "<u4")
    prompt = len(tokens) if prompt_tokens is None else prompt_tokens
    key = xxhash.xxh3_128_digest(_ROOT.pack(b"kvrelay-prefix-1", model, layout))
    keys: list[bytes] = []
    for start in range(0, len(tokens), BLOCK_TOKENS):
        block = tokens[start : start + BLOCK_TOKENS]
        written = b"" if start + len(block) <= prompt else _COUNT.pack(prompt)
        key = xxhash.xxh3_128_digest(key + _COUNT.pack(len(block)) + block.tobytes() + written)
        keys.append(key)
    return keys
