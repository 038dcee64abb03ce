"""Launches of kernels, each of which may begin before the one ahead of it has ended.

On compute capability 9.0 and later a kernel that waits for its producers itself is launched with programmatic
stream serialization (CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"): once
every thread block of the kernel ahead has called `release_dependents()` or ended, it takes what room there
is, so that its launch, its first instructions and its first reads hide behind the other's end. From CUDA 12.3
on stream capture takes that down as it is. Kernels with these two calls (`sources/primitives.cuh`) obey:

- `await_producers()` returns when all kernels ahead have ended and their writes are visible. Every thread
  block comes there, even one without work; and every thread before it reads what an earlier kernel wrote,
  *and before it writes anything that an earlier kernel may still read or write*.
- What the wait makes visible is read by plain loads, asynchronous copies or bulk copies, never by `__ldg` or
  `load_once`: the compiler may put those ahead of the wait, and the cache behind them is not emptied by it.
- Before the wait nothing may be read but what no kernel of a step writes: weights (loading ends when they are
  written) and tables of angles, by any load; and what the host told of the step, by bulk copies or
  `load_fresh` alone (the first-level cache may still hold what lay there a step ago). It is brought by a
  copy, or written by `step_rows`, launched plainly ahead of the step's graph. Kernels wait for copies whole,
  and graphs for all ahead of them, so that the second of two steps may also read what the first has left.
- Memory of the host is written at the end of a step (`draw`), and never read by kernels. The host reads it
  once an event behind the step is done, when all that kernels have written to pinned memory is visible.
- `release_dependents()` comes first of all: it only lets the next kernel in, and makes nothing visible. The
  next one's thread blocks take room only once all of this one's have begun.

Memory that is used again is safe by the same rules. Kernel n + 2 waits until n + 1 has ended; that ends only
after its own wait, so after n has ended. So whoever is past its wait is alone with all that was launched
before, and an address that a pool gives out again has no reader or writer left. Kernels of libraries, copies,
and kernels without the wait are launched plainly: they begin when everything ahead of them has ended.
"""

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvrelay_kernels.cuda.driver import Version, driver_library
from kvrelay_kernels.errors import KernelError

OLDEST_CAPABILITY, OLDEST_CUDA = (9, 0), (12, 3)
"""From which on kernels overlap: the GPU's compute capability, and the CUDA that its driver serves."""

# The driver API's numbers and structures (cuda.h), packed as C lays them out: quicker than ctypes.
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_INVALID_CONTEXT = 201
_ATTRIBUTE = struct.Struct("ii64s")
"""`CUlaunchAttribute`: number, padding, and a value."""
_CONFIG = struct.Struct("7IPPI4x")
"""`CUlaunchConfig`: grid, block, shared memory, stream, attributes, and how many there are."""
_WORD = struct.Struct("q")


def launch_attribute(number: int, *value: int) -> "ctypes.Array[ctypes.c_char]":
    """A `CUlaunchAttribute` whose value is of 32-bit integers; it lives as long as the buffer."""
    return ctypes.create_string_buffer(_ATTRIBUTE.pack(number, 0, struct.pack(f"{len(value)}I", *value)))


def launch_config(
    grid: Sequence[int],
    block: Sequence[int],
    shared_bytes: int,
    stream: int,
    attribute: "ctypes.Array[ctypes.c_char]",
    attributes: int = 1,
) -> bytes:
    """A `CUlaunchConfig` that points to `attribute`, if `attributes` is not 0."""
    return _CONFIG.pack(
        *_dimensions(grid), *_dimensions(block), shared_bytes, stream, ctypes.addressof(attribute), attributes
    )


_OVERLAP = launch_attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 1)


class Kernel:
    """A loaded kernel; called, it is launched on CuPy's current stream."""

    def __init__(self, function: Any, overlaps: bool) -> None:
        """`function` is a `cupy.cuda.function.Function`; `overlaps`: it waits for its producers itself."""
        from cupy.cuda import get_current_stream  # pyright: ignore[reportMissingImports]

        self._function = function
        self._handle = ctypes.c_void_p(function.ptr)
        self.overlaps = overlaps
        self._launch = driver_library().cuLaunchKernelEx
        self._current_stream: Any = get_current_stream

    @property
    def ptr(self) -> int:
        """The driver's handle."""
        return self._function.ptr

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], shared_mem: int = 0
    ) -> None:
        """Launch `grid` thread blocks of `block` threads with `shared_mem` bytes of dynamic shared memory.

        An empty grid is no launch.

        Args:
            args: the kernel's parameters: arrays of CuPy, whose addresses are passed; Python's integers, as
                64 bits; NumPy's scalars as they are, among them `np.void` for structures.

        Raises:
            KernelError: the driver refused; the message holds its code.
        """
        if 0 in grid:
            return
        stream = self._current_stream().ptr
        config = launch_config(grid, block, shared_mem, stream, _OVERLAP, self.overlaps)
        parameters = (ctypes.c_char_p * len(args))(*map(parameter_bytes, args))
        call = config, self._handle, parameters, None
        code = self._launch(*call)
        if code == _INVALID_CONTEXT:
            from cupy.cuda import runtime  # pyright: ignore[reportMissingImports]

            runtime.free(0)  # a thread has no context before its first call of the runtime
            code = self._launch(*call)
        if code:
            raise KernelError(f"cuLaunchKernelEx failed with {code} for {grid} blocks of {block} threads")


def overlaps_kernels(capability: tuple[int, int], cuda: Version) -> bool:
    """Whether kernels may begin before the ones ahead end, on such a GPU with such a driver."""
    return capability >= OLDEST_CAPABILITY and cuda >= OLDEST_CUDA


def device_overlaps_kernels() -> bool:
    """`overlaps_kernels` of CuPy's current device."""
    import cupy  # pyright: ignore[reportMissingImports]

    major, minor = divmod(int(cupy.cuda.Device().compute_capability), 10)
    version = cupy.cuda.runtime.driverGetVersion()
    return overlaps_kernels((major, minor), (version // 1000, version % 1000 // 10))


def _dimensions(sizes: Sequence[int]) -> tuple[int, ...]:
    return (*map(int, sizes), 1, 1)[:3]


def parameter_bytes(arg: Any) -> bytes:
    """A kernel's parameter as it lies in memory: see `Kernel.__call__`."""
    if isinstance(arg, np.generic):
        return arg.tobytes()
    return _WORD.pack(arg if isinstance(arg, int) else arg.data.ptr)
