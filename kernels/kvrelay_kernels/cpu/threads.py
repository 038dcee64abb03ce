"""Which thread pool Numba runs its parallel loops on."""

import ctypes
from importlib.metadata import PackageNotFoundError, files

LIBRARY = "libtbb.so.12"


def load_tbb() -> bool:
    """Load oneTBB's wheel, where there is one, so that Numba finds it; call before the first parallel loop.

    With OpenMP a loop waits until every thread of the pool has had its turn, which on a busy machine is a
    time slice of milliseconds, a hundred times a step. With oneTBB whoever has a core takes what is left.
    """
    try:
        found = [path.locate() for path in files("tbb") or () if path.name == LIBRARY]
        for path in found:
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except (PackageNotFoundError, OSError):
        return False
    return bool(found)
