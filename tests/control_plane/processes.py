"""Whatever a command has started, found by a mark in its environment; needs Linux's /proc."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

MARK = "KVRELAY_TEST_MARK"


class Marked:
    """A command whose processes, all of them, can be found again."""

    def __init__(self, *arguments: str) -> None:
        self._mark = f"{MARK}={uuid.uuid4()}".encode()
        name, _, value = self._mark.decode().partition("=")
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name("kvrelay")), *arguments],
            env={**os.environ, name: value},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A group of its own, as a shell gives to a job: Ctrl-C reaches every process in it.
            start_new_session=True,
        )

    @property
    def alive(self) -> list[str]:
        """The command lines of the processes that live."""
        found: list[str] = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return [line for line in found if line]

    def read_until(self, text: str) -> list[str]:
        """The lines of standard error up to the first that holds a text."""
        lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            lines.append(line)
            if text in line:
                return lines
        raise AssertionError(f"{text!r} is not among: {''.join(lines)}")

    def end(self) -> None:
        """Kill what is left, and close the pipes."""
        self.process.kill()
        self.process.communicate()
