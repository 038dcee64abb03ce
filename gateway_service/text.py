"""Text out of tokens: whole characters only, and stop strings found across token borders."""

from collections.abc import Callable, Sequence

CONTEXT_TOKENS = 6
"""Tokens of the prompt that the first piece is decoded behind, so that its leading space comes out right."""

HELD_TOKENS = 16
"""Tokens that may wait for the rest of a character; no character has as many, so the bytes are invalid."""

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Text of one answer, token by token.

    A token's text depends on its neighbours (spaces, bytes of one character), so each piece is what decoding
    the last few tokens gives beyond what decoding all but the new ones gave.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        """`decode` gives the text of some ids, without special tokens."""
        self._decode = decode
        self._window = list(prompt[-CONTEXT_TOKENS:])
        self._done = len(self._window)
        """Tokens of the window whose text has been given."""
        self._done_text = decode(self._window)

    def push(self, token_id: int) -> str:
        """The text that one more token completes: empty while a character lacks bytes."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and len(self._window) - self._done < HELD_TOKENS:
            return ""
        piece = text[len(self._done_text) :]
        if not piece:  # a special token: the next word's neighbour is still the one before it
            del self._window[self._done :]
            return ""
        # The next window begins at the last piece: enough for the neighbours to count.
        self._window = self._window[self._done :]
        self._done = len(self._window)
        self._done_text = self._decode(self._window)
        return piece


class StopStrings:
    """Cuts a text at the first stop string, holding back only what may still become one.

    The one that is complete first wins, whatever the pieces in which the text comes; of two that are complete
    at the same character the longer.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(sorted(stops, key=len, reverse=True))
        self._held = ""
        self.hit: str | None = None
        """The stop string that was found."""

    def push(self, piece: str, may_end: bool = True) -> str:
        """The text that is certain now. Unless `may_end`, a stop string complete in this piece does not count."""
        if not self._stops:
            return piece
        held, text = len(self._held), self._held + piece
        if may_end and (cut := self._find(text, held)) is not None:
            self._held = ""
            return text[:cut]
        keep = self._unfinished(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is still held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str, held: int) -> int | None:
        """Where the stop string begins that is complete first, beyond the first `held` characters."""
        end = len(text) + 1
        for stop in self._stops:
            start = text.find(stop, max(0, held - len(stop) + 1))
            if start >= 0 and start + len(stop) < end:
                self.hit, end = stop, start + len(stop)
        return None if self.hit is None else end - len(self.hit)

    def _unfinished(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        for length in range(min(len(text), len(self._stops[0]) - 1), 0, -1):
            tail = text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stops):
                return length
        return 0
