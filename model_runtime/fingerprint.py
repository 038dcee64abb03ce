"""Which weights these are: a hash of the files' contents, the same on every machine."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from model_runtime.files import write_atomically


def fingerprint_of(files: Iterable[Path], cache_dir: Path | None) -> str:
    """One SHA-256 over the SHA-256 of each file, in order of their names."""
    whole = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        whole.update(bytes.fromhex(_known_sha256(file, cache_dir)))
    return whole.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _known_sha256(path: Path, cache_dir: Path | None) -> str:
    """As `file_sha256`, remembered in `cache_dir` as long as path, size and time of change stay."""
    if cache_dir is None:
        return file_sha256(path)
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()
    note = cache_dir / "sha256" / key
    if note.is_file():
        digest = note.read_text(encoding="ascii", errors="replace")
        if len(digest) == 64 and set(digest) <= set("0123456789abcdef"):
            return digest
    digest = file_sha256(path)
    write_atomically(note, digest.encode())
    return digest
