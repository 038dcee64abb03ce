"""What a result says of where and on what it was measured, and how busy the machine was with other things."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("numpy", "numba", "tbb", "ray", "grpcio", "protobuf", "tokenizers")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def result_path(name: str) -> Path:
    """Where a CPU script keeps its result unless it is told otherwise."""
    return RESULTS / f"cpu-{cores()}core" / f"{name}.json"


def provenance(packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Commit, machine and versions: the head of every result."""
    return {
        "commit": _commit(),
        "machine": f"{_slug(_cpu_brand())}-{cores()}core",
        "system": f"{platform.system().lower()}-{platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in packages},
        },
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def gpu_provenance(packages: Iterable[str], commit: str | None = None) -> dict[str, Any]:
    """`provenance` and the GPU; `commit` names it where the checkout has no repository."""
    from cupy.cuda import runtime  # pyright: ignore[reportMissingImports]

    head = provenance(packages) | {
        "gpu": runtime.getDeviceProperties(0)["name"].decode(),
        "driver": runtime.driverGetVersion(),
        "cuda_runtime": runtime.runtimeGetVersion(),
    }
    return head | {"commit": commit} if commit else head


@dataclass(frozen=True)
class Clock:
    """CPU seconds since the boot: of the machine, stolen from it, and of this process and its children."""

    wall: float
    busy: float
    stolen: float
    own: float

    @classmethod
    def now(cls) -> Self:
        """Read them; where there is no `/proc`, all but the wall clock stand still."""
        if not Path("/proc/stat").exists():
            return cls(time.perf_counter(), 0.0, 0.0, 0.0)
        hertz = os.sysconf("SC_CLK_TCK")
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
        user, nice, system, _, _, irq, softirq, steal = map(int, first.split()[1:9])
        busy = user + nice + system + irq + softirq
        return cls(time.perf_counter(), busy / hertz, steal / hertz, _own_ticks() / hertz)


@dataclass(frozen=True)
class Weather:
    """Cores in use on average over a while: by this process and its children, by others, and by the host."""

    own: float
    others: float
    stolen: float

    @classmethod
    def between(cls, begin: Clock, end: Clock) -> Self:
        """What it was between two readings."""
        wall, own = end.wall - begin.wall, end.own - begin.own
        shares = (own, max(0.0, end.busy - begin.busy - own), end.stolen - begin.stolen)
        return cls(*(round(share / wall, 3) for share in shares))

    @property
    def disturbance(self) -> float:
        """Cores that were not ours to have."""
        return self.others + self.stolen


def wait_until_quiet(limit: float, patience: float, seconds: float = 2.0) -> tuple[Weather, float]:
    """Wait until others take fewer than `limit` cores for `seconds`; gives the weather and the time waited.

    After `patience` seconds it goes on all the same: the weather tells.
    """
    since = time.perf_counter()
    while True:
        begin = Clock.now()
        time.sleep(seconds)
        weather = Weather.between(begin, Clock.now())
        waited = time.perf_counter() - since
        if weather.disturbance < limit or waited > patience:
            return weather, round(waited - seconds, 1)


def write(result: dict[str, Any], path: Path) -> None:
    """Keep a result, its numbers to five digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(result), indent=2) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _own_ticks() -> int:
    """Clock ticks of this process and its descendants, ended ones that were waited for included."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        parents[int(entry.name)] = int(fields[1])
        ticks[int(entry.name)] = sum(map(int, fields[11:15]))
    own = {os.getpid()}
    while more := {process for process, parent in parents.items() if parent in own} - own:
        own |= more
    return sum(ticks.get(process, 0) for process in own)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The checkout's commit; `-dirty` where files that are not results differ from it."""
    where = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*where, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        paths = [":!benchmarks/results", ":!*.md", ":!tests"]
        changed = subprocess.run([*where, "diff", "--quiet", "HEAD", "--", ".", *paths], check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if changed.returncode else "")


def _cpu_brand() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
