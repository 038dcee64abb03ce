"""How many clusters of thread blocks a GPU runs at once.

The thread blocks of a cluster run in one of the GPU's groups of multiprocessors, and groups differ in size,
even on GPUs of one name: what fits is asked of the driver.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from kvrelay_kernels.cuda.driver import driver_library
from kvrelay_kernels.cuda.launch import launch_attribute, launch_config
from kvrelay_kernels.errors import KernelError

PORTABLE, LARGEST = 8, 16
"""Thread blocks that every GPU with clusters runs together, and those that the classes below do."""
_LARGE = ("sm_90a", "sm_100")

Rooms = Mapping[int, int]
"""By the number of thread blocks in a cluster: how many such clusters run at once."""

# Numbers of the driver API (cuda.h).
_CLUSTER_DIMENSION = 4
_NON_PORTABLE_ALLOWED = 14


def largest_cluster(arch: str) -> int:
    """Most thread blocks that run together on an architecture such as `sm_90a`; 1 where none do."""
    if arch in _LARGE:
        return LARGEST
    return PORTABLE if int(arch.removeprefix("sm_").rstrip("af")) >= 90 else 1


def allow_large(kernel: Any) -> None:
    """Let a kernel run in clusters of more than `PORTABLE` thread blocks."""
    from cupy.cuda import driver  # pyright: ignore[reportMissingImports]

    driver.funcSetAttribute(kernel.ptr, _NON_PORTABLE_ALLOWED, 1)


def find_rooms(kernel: Any, threads: int, shared_bytes: int, sizes: Sequence[int]) -> Rooms:
    """The clusters of `sizes` thread blocks of a kernel that run at once on CuPy's current device.

    Args:
        kernel: a loaded one whose source sets no size; allowed `shared_bytes` of dynamic shared memory.
        threads: of a thread block.

    Raises:
        KernelError: the driver refused; the message holds its code.
    """
    if max(sizes) > PORTABLE:
        allow_large(kernel)
    rooms: dict[int, int] = {}
    for size in sizes:
        attribute = launch_attribute(_CLUSTER_DIMENSION, size, 1, 1)
        config = launch_config((size,), (threads,), shared_bytes, 0, attribute)
        count = ctypes.c_int()
        code = driver_library().cuOccupancyMaxActiveClusters(
            ctypes.byref(count), ctypes.c_void_p(kernel.ptr), config
        )
        if code:
            raise KernelError(f"cuOccupancyMaxActiveClusters failed with {code} for clusters of {size}")
        rooms[size] = count.value
    return rooms
