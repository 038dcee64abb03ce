"""The GPU that a backend runs on, and what a start-up says where there is none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvrelay_kernels.errors import BackendUnavailable
from kvrelay_kernels.plans import DeviceClass

OLDEST_CAPABILITY = 80
"""Compute capability times ten: kernels use asynchronous copies and bfloat16 matrix instructions."""


@dataclass(frozen=True)
class Gpu:
    """CuPy's current device."""

    name: str
    capability: tuple[int, int]
    processors: int
    memory_bytes: int

    @property
    def device_class(self) -> DeviceClass:
        """Machines whose plans are this one's too."""
        return DeviceClass(self.capability, self.processors)


def find_gpu() -> Gpu:
    """The current device.

    Raises:
        BackendUnavailable: CuPy, the driver or a device is missing, too old, or not usable.
    """
    try:
        import cupy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise BackendUnavailable(
            f"CuPy is missing ({error}): pip install 'kvrelay[cuda13]' or 'kvrelay[cuda12]'"
        ) from error
    runtime = cupy.cuda.runtime
    try:
        if runtime.getDeviceCount() == 0:
            raise BackendUnavailable("no NVIDIA GPU is visible to this process")
        device = cupy.cuda.Device()
        found = runtime.getDeviceProperties(device.id)
    except runtime.CUDARuntimeError as error:
        raise BackendUnavailable(f"{_reason(runtime)} ({error})") from error
    capability = (int(found["major"]), int(found["minor"]))
    if 10 * capability[0] + capability[1] < OLDEST_CAPABILITY:
        raise BackendUnavailable(
            f"the GPU's compute capability is {capability[0]}.{capability[1]}; kernels need 8.0 or later"
        )
    return Gpu(
        found["name"].decode(),
        capability,
        int(found["multiProcessorCount"]),
        int(found["totalGlobalMem"]),
    )


def shared_memory_limit() -> int:
    """Bytes of shared memory that a thread block may have on the current device."""
    import cupy  # pyright: ignore[reportMissingImports]

    return int(cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"])


def architecture(capability: tuple[int, int], known: Sequence[int]) -> str:
    """What to compile for: the GPU's own architecture, on Hopper (`sm_90a`) with its own instructions.

    Where the compiler does not know it, the latest earlier one of the same major version, whose code it runs.
    Source: CUDA C++ Programming Guide, "Binary Compatibility".

    Args:
        capability: of the GPU.
        known: compute capabilities, times ten, that the compiler knows.

    Raises:
        BackendUnavailable: it knows none that would run.
    """
    major, minor = capability
    fitting = [number for number in known if number // 10 == major and number % 10 <= minor]
    if not fitting:
        raise BackendUnavailable(
            f"the GPU's compute capability is {major}.{minor}, which this NVRTC does not compile for (up to"
            f" {'.'.join(map(str, divmod(max(known, default=0), 10)))}): pip install -U nvidia-cuda-nvrtc,"
            " or with driver 12.x nvidia-cuda-nvrtc-cu12"
        )
    return "sm_90a" if max(fitting) == 90 else f"sm_{max(fitting)}"


def _reason(runtime: Any) -> str:
    """Why the runtime found no device, and what helps."""
    try:
        driver, library = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    except runtime.CUDARuntimeError:
        return "NVIDIA's driver is missing or does not answer: install it, then try again"
    if driver == 0:
        return "NVIDIA's driver is missing: install it, then try again"
    if driver < library:
        return (
            f"the driver serves CUDA {_dotted(driver)}, CuPy was built for {_dotted(library)}:"
            " update the driver, or install 'kvrelay[cuda12]'"
        )
    return "no NVIDIA GPU is usable here"


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
