"""What the CUDA backend needs, part by part: what is there, what is missing, and what to install."""

from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from kvrelay_kernels.cuda import nvrtc
from kvrelay_kernels.cuda.device import OLDEST_CAPABILITY, architecture
from kvrelay_kernels.cuda.driver import Driver, Version, dotted, find_driver
from kvrelay_kernels.cuda.prefill_attention_route import CUDNN_MAJOR, uses_cudnn
from kvrelay_kernels.cuda.wheels import nvidia_library
from kvrelay_kernels.errors import BackendUnavailable

SEEN_CAPABILITIES = ((9, 0),)
"""GPU classes that the tests of `tests/gpu` have run on."""
OLDEST_CUDNN = (9, 10, 2)
"""Earlier ones refuse paged caches of head dimension 256 and windows on Hopper, or compute them wrongly."""
OLDEST_FRONTEND = (1, 15)
RELEASES = {12: 525, 13: 580}
"""First release of the driver that serves a CUDA version."""


@dataclass(frozen=True)
class Found:
    """What a machine has; None: nothing of the kind."""

    driver: Driver | None = None
    cupy: str | None = None
    cupy_cuda: int | None = None
    """CUDA version that CuPy was built for; None where its name does not tell."""
    cudnn: Version | None = None
    frontend: str | None = None
    cublas: Version | None = None
    nvrtc: Version | None = None
    architectures: tuple[int, ...] = ()
    """Compute capabilities, times ten, that NVRTC compiles for."""


@dataclass(frozen=True)
class Part:
    """One thing that the backend needs."""

    name: str
    found: str | None
    """Its version, or what it is; None: it is missing."""
    advice: str | None = None
    """What to do about it, or to know of it."""
    ok: bool = True


def survey() -> list[Part]:
    """Every part, as it is on this machine. Loads NVIDIA's libraries, but uses no GPU."""
    return judge(look())


def look() -> Found:
    """What this machine has."""
    cupy, cupy_cuda = _cupy()
    return Found(
        driver=find_driver(),
        cupy=cupy,
        cupy_cuda=cupy_cuda,
        cudnn=_library_version("cudnn", (9,), "cudnnGetVersion"),
        frontend=_package_version("nvidia-cudnn-frontend") if find_spec("cudnn") else None,
        cublas=_library_version("cublasLt", (13, 12), "cublasLtGetVersion"),
        nvrtc=_nvrtc_version(),
        architectures=_architectures(),
    )


def judge(found: Found) -> list[Part]:
    """What each part means for the backend."""
    driver = found.driver
    served = driver.cuda[0] if driver is not None and driver.cuda > (0, 0) else None
    extra = "cuda12" if served == 12 else "cuda13"
    install = f"pip install 'kvrelay[{extra}]'"
    parts = [_driver_part(driver), _gpu_part(driver)]
    if found.cupy is None:
        parts.append(Part("CuPy", None, install, ok=False))
    else:
        parts.append(_library_part("CuPy", found.cupy, found.cupy_cuda, served))
    device = driver.devices[0] if driver is not None and driver.devices else None
    wanted = device is not None and uses_cudnn(device.capability)
    frontend = None if found.frontend is None else numbers(found.frontend)
    parts.append(_cudnn_part("cuDNN", found.cudnn, OLDEST_CUDNN, wanted, f"nvidia-cudnn-cu{extra[4:]}"))
    parts.append(
        _cudnn_part("cudnn-frontend", frontend, OLDEST_FRONTEND, wanted, "--no-deps nvidia-cudnn-frontend")
    )
    for name, number in (("cuBLASLt", found.cublas), ("NVRTC", found.nvrtc)):
        if number is None:
            parts.append(Part(name, None, install, ok=False))
        else:
            parts.append(_library_part(name, dotted(number), number[0], served))
    if device is not None and parts[-1].ok:
        parts[-1] = _compiling_part(parts[-1], device.capability, found.architectures)
    return parts


def cudnn_fault(cudnn: Version, frontend: Version) -> str | None:
    """Why prompts cannot go through cuDNN and cudnn-frontend of these versions; None: they can."""
    for name, found, oldest in (
        ("cuDNN", cudnn, OLDEST_CUDNN),
        ("cudnn-frontend", frontend, OLDEST_FRONTEND),
    ):
        if found < oldest:
            return (
                f"{name} {dotted(found)} is older than {dotted(oldest)}:"
                " pip install -U 'kvrelay[cuda13]' or 'kvrelay[cuda12]'"
            )
    return None


def _driver_part(driver: Driver | None) -> Part:
    name = "NVIDIA driver"
    releases = " or ".join(f"{release} or later for CUDA {cuda}" for cuda, release in RELEASES.items())
    if driver is None:
        return Part(name, None, f"install the driver: release {releases}", ok=False)
    if driver.fault:
        advice = f"it does not start (error {driver.fault}): `nvidia-smi` says more; reboot after an update"
        return Part(name, str(driver), advice, ok=False)
    if driver.cuda[0] < min(RELEASES):
        return Part(name, str(driver), f"too old: install release {releases}", ok=False)
    return Part(name, str(driver))


def _gpu_part(driver: Driver | None) -> Part:
    if driver is None or not driver.devices:
        hidden = "check `nvidia-smi` and CUDA_VISIBLE_DEVICES, or what the container was given"
        return Part("GPU", None, None if driver is None else hidden, ok=False)
    device = driver.devices[0]
    shown = f"{len(driver.devices)} x {device}" if len(driver.devices) > 1 else str(device)
    oldest = divmod(OLDEST_CAPABILITY, 10)
    if device.capability < oldest:
        return Part("GPU", shown, f"kernels need compute capability {dotted(oldest)}", ok=False)
    if device.capability not in SEEN_CAPABILITIES:
        return Part("GPU", shown, "a class that kernels were not tried on yet: `pytest tests/gpu` tries them")
    return Part("GPU", shown)


def _library_part(name: str, found: str, cuda: int | None, served: int | None) -> Part:
    """A library that must not be of a later CUDA than the driver serves."""
    if cuda is None or served is None or cuda <= served:
        return Part(name, found)
    remedy = f"update the driver to {RELEASES[cuda]}" if cuda in RELEASES else "update the driver"
    return Part(
        name,
        found,
        f"made for CUDA {cuda}, the driver serves {served}: {remedy}, or pip install 'kvrelay[cuda{served}]'",
        ok=False,
    )


def _cudnn_part(name: str, found: Version | None, oldest: Version, wanted: bool, package: str) -> Part:
    """A part of cuDNN: on most classes prompts never go through it, and nowhere do they have to."""
    shown = None if found is None else dotted(found)
    if found is not None and found >= oldest:
        return Part(name, shown)
    if not wanted:
        return Part(name, shown, f"used on compute capability {CUDNN_MAJOR}.x alone")
    age = "" if found is None else f"older than {dotted(oldest)}, so "
    return Part(name, shown, f"{age}prompts take slower kernels: pip install -U {package}", ok=False)


def _compiling_part(nvrtc_part: Part, capability: tuple[int, int], known: tuple[int, ...]) -> Part:
    """NVRTC has to know the GPU's class."""
    if capability < divmod(OLDEST_CAPABILITY, 10):
        return nvrtc_part
    try:
        architecture(capability, known)
    except BackendUnavailable as error:
        return replace(nvrtc_part, advice=str(error), ok=False)
    return nvrtc_part


def _cupy() -> tuple[str | None, int | None]:
    for name, cuda in (("cupy-cuda13x", 13), ("cupy-cuda12x", 12), ("cupy", None)):
        found = _package_version(name)
        if found is not None:
            return found, cuda
    return None, None


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _library_version(stem: str, versions: tuple[int, ...], function: str) -> Version | None:
    """What a library's own function says."""
    try:
        number = int(getattr(nvidia_library(stem, versions, ""), function)())
    except (BackendUnavailable, AttributeError):
        return None
    return spoken(number)


def spoken(number: int) -> Version:
    """A version as cuDNN and cuBLAS tell it: major * 10000 + minor * 100 + patch."""
    return number // 10000, number % 10000 // 100, number % 100


def _nvrtc_version() -> Version | None:
    try:
        return numbers(nvrtc.version())
    except BackendUnavailable:
        return None


def _architectures() -> tuple[int, ...]:
    try:
        return nvrtc.architectures()
    except BackendUnavailable:
        return ()


def numbers(text: str) -> Version:
    """Such as (1, 32, 0) for `1.32.0`."""
    return tuple(int(part) for part in text.split(".") if part.isdecimal())
