"""Stop strings, found across token borders."""

from collections.abc import Sequence


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
        """The text that is certain now. Unless `may_end`, no stop string that ends in the piece counts."""
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
