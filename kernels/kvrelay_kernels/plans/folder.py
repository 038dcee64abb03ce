"""Plans on disk: one file each, in a folder that processes share and that may be read-only, full or gone."""

import fcntl
import logging
import os
import re
import stat
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO

log = logging.getLogger(__name__)

LIMIT_BYTES = 2 * 1024**3
"""About what a folder may hold; beyond it, the plans that were not asked for longest go."""

PATIENCE_SECONDS = 120.0
"""Longest wait for another process's build: more than any takes, so that only a stuck one is passed by."""

_POLL_SECONDS = 0.01
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}", re.ASCII)
_LOCK_SUFFIX = ".lock"


class FolderBlobs:
    """Blobs as files: readers see one whole or not at all. What the disk refuses is forgotten."""

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        """The folder is made when something is put into it."""
        self._folder = folder
        self._limit = limit_bytes
        self._unmeasured = 0
        """Bytes that may still be put here until the folder is measured again."""
        self._complained = False

    def get(self, name: str) -> bytes | None:
        """The blob; None where there is none, or it cannot be read."""
        path = _path(self._folder, name)
        try:
            blob = path.read_bytes()
        except OSError:
            return None
        with suppress(OSError):
            os.utime(path)  # its age says when it was last asked for
        return blob

    def put(self, name: str, blob: bytes) -> None:
        """Keep a blob, if the disk takes it, in place of the one before."""
        path = _path(self._folder, name)
        draft: Path | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=self._folder, prefix=".", delete=False) as file:
                draft = Path(file.name)
                file.write(blob)
            draft.replace(path)
            self._unmeasured -= len(blob)
            if self._unmeasured < 0:
                self._unmeasured = self._limit // 16
                self._prune()
        except OSError as error:
            if draft is not None:
                with suppress(OSError):
                    draft.unlink()
            if not self._complained:
                log.warning("plans are not kept in %s: %s", self._folder, error)
            self._complained = True

    def _prune(self) -> None:
        # Drafts of processes that died count too, and age like the rest.
        ages: list[tuple[float, int, Path]] = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # another process may prune, too
                found = path.stat()
                if stat.S_ISREG(found.st_mode) and path.suffix != _LOCK_SUFFIX:
                    ages.append((found.st_mtime, found.st_size, path))
        excess = sum(size for _, size, _ in ages) - self._limit
        for _, size, path in sorted(ages):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size


class FolderLocks:
    """Locks between the processes that share a folder; the system lets go of those of a process that dies."""

    def __init__(self, folder: Path, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._folder = folder
        self._patience = patience_seconds

    @contextmanager
    def hold(self, name: str) -> Generator[None]:
        """Hold the lock of a name. Where there can be none (a read-only disk), or it is never free, go on."""
        path = _path(self._folder, name + _LOCK_SUFFIX)
        lock = self._acquire(path)
        try:
            yield
        finally:
            if lock is not None:
                with suppress(OSError):
                    path.unlink()  # while it is held: whoever has opened it meanwhile sees that it is gone
                lock.close()

    def _acquire(self, path: Path) -> IO[bytes] | None:
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                file = path.open("wb")
            except OSError:
                return None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(file, path):
                    return file
                file.close()
            except BlockingIOError:
                file.close()
                time.sleep(_POLL_SECONDS)
            except OSError:
                file.close()
                return None
        log.warning("%s was held for %.0f s: going on without it", path, self._patience)
        return None


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _path(folder: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a file: lower-case letters, digits, '.', '_', '-'")
    return folder / name
