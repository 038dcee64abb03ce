"""What a person sees while a system starts, on standard error: bars on a terminal, else plain lines."""

import re
import sys
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%")


class StartView:
    """Shows who does what until it is closed; quiet, it shows nothing."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._quiet = quiet
        self._stream = stream or sys.stderr
        self._drawn: Progress | None = None
        self._rows: dict[str, TaskID] = {}
        self._phases: dict[str, str] = {}
        if self._stream.isatty() and not quiet:
            columns = (
                SpinnerColumn(finished_text="✓"),
                TextColumn("{task.description:<10}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[what]}"),
            )
            self._drawn = Progress(*columns, console=Console(file=self._stream), transient=True)

    def __enter__(self) -> Self:
        if self._drawn is not None:
            self._drawn.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bars away; what is told later comes as lines. Calling it again does nothing."""
        if self._drawn is not None:
            self._drawn.stop()
            self._drawn = None

    def tell(self, who: str, what: str) -> None:
        """Someone began something, or is so many percent through it."""
        percent = PERCENT.search(what)
        self._show(who, PERCENT.sub("", what), float(percent.group(1)) if percent else None)

    def progress(self, what: str, done: int, total: int) -> None:
        """A job of this process is so far, as model_runtime.progress wants it."""
        self._show("model", what, 100 * done / total if total else None)

    def _show(self, who: str, phase: str, percent: float | None) -> None:
        if self._drawn is not None:
            if who not in self._rows:
                self._rows[who] = self._drawn.add_task(who, total=None, what=phase)
            ready = phase == "ready"
            self._drawn.update(
                self._rows[who],
                what=phase,
                total=100 if ready or percent is not None else None,
                completed=100 if ready else percent or 0,
            )
        elif not self._quiet and self._phases.get(who) != phase:
            print(f"{who}: {phase}", file=self._stream, flush=True)
        self._phases[who] = phase
