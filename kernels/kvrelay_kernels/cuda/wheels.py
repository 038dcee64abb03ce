"""NVIDIA's libraries, from their wheels or from where the system's loader looks; no toolkit needed."""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

from kvrelay_kernels.errors import BackendUnavailable


@cache
def nvidia_library(stem: str, versions: tuple[int, ...], remedy: str) -> ctypes.CDLL:
    """Load `lib<stem>.so` of one of the major `versions`, the first that is there.

    Raises:
        BackendUnavailable: none is; the message ends in `remedy`.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    names = [f"lib{stem}.so.{version}" for version in versions]
    places = [
        str(path) for folder in folders for name in names for path in sorted(folder.glob(f"*/lib/{name}"))
    ]
    for place in [*places, *names, f"lib{stem}.so"]:
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise BackendUnavailable(f"{stem} is missing: {remedy}")
