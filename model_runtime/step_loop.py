"""The one thread of an engine: it takes steps while there is work, and sleeps otherwise."""

import logging
import sys
import threading
from abc import ABC, abstractmethod

from kvrelay.errors import Draining, Internal, KvrelayError

log = logging.getLogger(__name__)

SWITCH_SECONDS = 1e-4


class StepLoop(ABC):
    """A thread that calls `step` whenever `has_work`.

    Whoever gives it work, from any thread, changes state inside `with self.changed` and calls `wake` there.
    """

    def __init__(self, name: str, poll_seconds: float) -> None:
        """`poll_seconds`: how often an idle loop looks for what nobody tells it of, such as a deadline."""
        self.changed = threading.Condition()
        self.draining = False
        """Whether new work is refused."""
        self._poll_seconds = poll_seconds
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abstractmethod
    def has_work(self) -> bool:
        """Whether a step would do something; called with `changed` held."""

    @abstractmethod
    def step(self) -> None:
        """Do some work; called without `changed`, by the loop's thread alone."""

    @abstractmethod
    def fail(self, error: KvrelayError) -> None:
        """End every request that is here with `error`; called by the loop's thread, or after its end."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether any request is here, even one that waits for others."""

    def start(self) -> None:
        """Start the thread."""
        # Between two steps the loop needs the interpreter for microseconds, while the server's thread holds
        # it longer for each message: by default the loop would wait for all of that, up to 5 ms.
        sys.setswitchinterval(SWITCH_SECONDS)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step, refuse new work, and fail what still runs with Draining."""
        with self.changed:
            self._stopping = self.draining = True
            self.changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self.fail(Draining("the worker was stopped"))

    def drain(self) -> None:
        """Refuse new work, and return when none is left."""
        with self.changed:
            self.draining = True
            self.changed.wait_for(lambda: self._stopping or not self.busy)

    def wake(self) -> None:
        """Have the loop look for work again."""
        with self.changed:
            self.changed.notify_all()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._stopping or self.has_work(), self._poll_seconds)
                if self._stopping:
                    return
            try:
                self.step()
            except Exception as error:
                # A fault of ours must not leave requests without a reply, nor the worker without a loop.
                log.exception("a step failed")
                self.fail(Internal(f"{type(error).__name__}: {error}"))
