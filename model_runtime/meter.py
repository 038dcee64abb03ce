"""Tokens per second, over the recent past."""

import time
from collections import deque


class Meter:
    """Counts events and tells their rate over the last `window` seconds."""

    def __init__(self, window: float = 10.0) -> None:
        self.total = 0
        self._window = window
        self._marks: deque[tuple[float, int]] = deque()

    def add(self, count: int) -> None:
        """Count `count` events now."""
        self.total += count
        self._marks.append((time.monotonic(), count))
        self._forget()

    @property
    def rate(self) -> float:
        """Events per second over the window; 0 when nothing happened in it."""
        self._forget()
        return sum(count for _, count in tuple(self._marks)) / self._window

    def _forget(self) -> None:
        horizon = time.monotonic() - self._window
        while self._marks and self._marks[0][0] < horizon:
            self._marks.popleft()
