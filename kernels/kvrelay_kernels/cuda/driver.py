"""What NVIDIA's driver says of itself and of its GPUs, through ctypes: no context is made, no CuPy needed."""

import ctypes
from collections.abc import Callable
from ctypes import byref, c_int, c_size_t
from dataclasses import dataclass
from functools import cache
from typing import Any

from kvrelay_kernels.errors import BackendUnavailable

Version = tuple[int, ...]

# Numbers of the driver API (cuda.h).
_MAJOR, _MINOR, _PROCESSORS = 75, 76, 16
_NO_DEVICE = 100
_TEXT_BYTES = 256


@dataclass(frozen=True)
class Device:
    """One GPU."""

    name: str
    capability: tuple[int, int]
    processors: int
    memory_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.name}, compute capability {self.capability[0]}.{self.capability[1]},"
            f" {self.processors} multiprocessors, {self.memory_bytes / 2**30:.0f} GiB"
        )


@dataclass(frozen=True)
class Driver:
    """The driver that is loaded."""

    cuda: Version
    """Latest CUDA that it serves, such as (13, 0)."""
    release: str | None
    """Such as `580.95.05`; None where the management library is missing."""
    fault: int
    """Error code with which it refuses to start; 0: it runs."""
    devices: tuple[Device, ...]
    """Those that this process may see."""

    def __str__(self) -> str:
        return f"{self.release or 'of unknown release'} (CUDA {dotted(self.cuda)})"


def find_driver(load: Callable[[str], Any] = ctypes.CDLL) -> Driver | None:
    """The driver; None where there is none. `load` opens a shared library, or raises OSError."""
    try:
        library = load("libcuda.so.1")
    except OSError:
        return None
    number = c_int()
    library.cuDriverGetVersion(byref(number))
    cuda = number.value // 1000, number.value % 1000 // 10
    fault = library.cuInit(0)
    count = c_int()
    if not fault:
        library.cuDeviceGetCount(byref(count))
    devices = tuple(_device(library, ordinal) for ordinal in range(count.value))
    return Driver(cuda, _release(load), 0 if fault == _NO_DEVICE else fault, devices)


@cache
def driver_library() -> ctypes.CDLL:
    """The driver's own interface, for calls that CuPy lacks. Raises BackendUnavailable."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendUnavailable(f"NVIDIA's driver is missing: {error}") from error


def dotted(version: Version) -> str:
    """Such as `13.0`."""
    return ".".join(map(str, version))


def _device(library: Any, ordinal: int) -> Device:
    handle = c_int()
    library.cuDeviceGet(byref(handle), ordinal)
    name, memory = ctypes.create_string_buffer(_TEXT_BYTES), c_size_t()
    library.cuDeviceGetName(name, _TEXT_BYTES, handle)
    library.cuDeviceTotalMem_v2(byref(memory), handle)

    def attribute(number: int) -> int:
        value = c_int()
        library.cuDeviceGetAttribute(byref(value), number, handle)
        return value.value

    capability = attribute(_MAJOR), attribute(_MINOR)
    return Device(name.value.decode(), capability, attribute(_PROCESSORS), memory.value)


def _release(load: Callable[[str], Any]) -> str | None:
    try:
        library = load("libnvidia-ml.so.1")
    except OSError:
        return None
    if library.nvmlInit_v2():
        return None
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    failed = library.nvmlSystemGetDriverVersion(text, _TEXT_BYTES)
    library.nvmlShutdown()
    return None if failed else text.value.decode()
