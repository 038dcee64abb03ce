"""The bytes behind the tokens of the two ways in which BPE vocabularies write them."""

import re
from collections.abc import Callable

TokenBytes = Callable[[str], bytes]
"""From a token as the vocabulary writes it to its bytes."""

SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_bytes() -> TokenBytes:
    """The rule of GPT-2's vocabularies, in which every byte is a printable character.

    Source: bytes_to_unicode in https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

    def to_bytes(token: str) -> bytes:
        try:
            return bytes(table[character] for character in token)
        except KeyError:
            return token.encode()

    return to_bytes


def spm_bytes(token: str) -> bytes:
    """The rule of SentencePiece's vocabularies: `▁` is a space, `<0x0A>` a byte that has no other token."""
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()
