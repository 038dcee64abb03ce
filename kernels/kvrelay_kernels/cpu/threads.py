"""Which thread pool Numba runs its parallel loops on."""

import ctypes
from importlib.metadata import PackageNotFoundError, files
from threading import get_ident

import numba

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


class Threads:
    """How many threads parallel loops run on."""

    def __init__(self, wanted: int) -> None:
        load_tbb()
        self.count = max(1, min(wanted, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        self._caller = 0

    def claim(self) -> int:
        """Their number, also set for the calling thread: Numba counts for each caller apart."""
        caller = get_ident()
        if caller != self._caller:
            numba.set_num_threads(self.count)
            self._caller = caller
        return self.count
