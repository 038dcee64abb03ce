"""How long jobs (download, unpacking, packing weights, warm-up) tell how far they are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is, in the same unit."""


def silent(what: str, done: int, total: int) -> None:
    """The Progress that tells nobody."""


@contextmanager
def bar() -> Iterator[Progress]:
    """A Progress that draws one bar a job on standard error, while the context lasts."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as drawn:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = drawn.add_task(what, total=total)
            drawn.update(tasks[what], completed=done, total=total)

        yield tell
