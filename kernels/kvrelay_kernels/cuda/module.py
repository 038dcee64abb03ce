"""Kernels by key: source, constants and architecture name a cubin, compiled once and kept as a plan."""

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvrelay_kernels.cuda import nvrtc
from kvrelay_kernels.cuda.device import architecture
from kvrelay_kernels.cuda.launch import Kernel, device_overlaps_kernels
from kvrelay_kernels.errors import KernelError
from kvrelay_kernels.plans import DeviceClass, GraphKey, PlanCache, PlanCounts, PlanStore, open_plans
from kvrelay_kernels.plans.encoding import encode

SOURCES = Path(__file__).parent / "sources"

Constants = Mapping[str, int | bool]
"""Macros that a source is compiled with."""

CUBINS = 4
"""Kept in memory: few, for a kernel that is loaded needs its cubin no more."""


@dataclass(frozen=True)
class KernelKey:
    """What decides a kernel's machine code, besides the sources and the compiler."""

    source: str
    """A file in `sources/`, without its ending; also the name of the kernel in it."""
    constants: tuple[tuple[str, int], ...]
    arch: str
    """Such as `sm_90a`."""

    @classmethod
    def of(cls, source: str, constants: Constants, arch: str) -> "KernelKey":
        """A key whose constants are in a fixed order."""
        return cls(source, tuple(sorted((name, int(value)) for name, value in constants.items())), arch)

    @property
    def options(self) -> list[str]:
        """NVRTC's command line."""
        return [
            "--std=c++17",
            "-default-device",
            f"--gpu-architecture={self.arch}",
            *[f"-D{name}={value}" for name, value in self.constants],
        ]

    @property
    def graph_key(self) -> GraphKey:
        """Everything that decides the cubin: the key, every source text and the compiler's version."""
        number = self.arch.removeprefix("sm_").rstrip("af")
        return GraphKey.of(
            "cubin",
            DeviceClass((int(number[:-1]), int(number[-1]))),
            attributes={
                "source": self.source,
                "options": tuple(self.options),
                "texts": _texts_digest(self.source),
            },
            libraries={"nvrtc": nvrtc.version()},
        )


@cache
def _headers() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(SOURCES.glob("*.cuh"))}


@cache
def _text(source: str) -> str:
    return (SOURCES / f"{source}.cu").read_text()


@cache
def _texts_digest(source: str) -> bytes:
    texts = encode((_text(source), tuple(_headers().items())))
    return hashlib.blake2b(texts, digest_size=16).digest()


def awaits_producers(source: str) -> bool:
    """Whether a kernel waits for the kernels ahead itself, in its own file: see `launch`."""
    return "await_producers();" in _text(source)


def compile_kernel(key: KernelKey) -> bytes:
    """The cubin of a key, from the compiler. Raises BackendUnavailable or CompileFailed."""
    return nvrtc.compile_cubin(_text(key.source), _headers(), key.options)


class KernelCache:
    """Loaded kernels of this process's current device; safe to call from several threads."""

    def __init__(self, plans: PlanStore | Path | None = None, overlap: bool = True) -> None:
        """`plans` is where cubins are kept: a store, a folder, or nowhere; `overlap`: see `launch`."""
        store = plans if isinstance(plans, PlanStore) else open_plans(plans)
        self._cubins: PlanCache[bytes] = PlanCache(store, CUBINS)
        self._overlap = overlap
        self._loaded: dict[KernelKey, Kernel] = {}
        self._shared: dict[KernelKey, int] = {}
        self._lock = threading.Lock()

    @property
    def counts(self) -> PlanCounts:
        """How cubins were come by."""
        return self._cubins.counts

    def cubin(self, key: KernelKey) -> bytes:
        """The cubin, from the store or from the compiler. Raises as `compile_kernel`."""
        return self._cubins.get(key.graph_key, lambda: compile_kernel(key), bytes, _machine_code).value

    def load(self, key: KernelKey, shared_bytes: int) -> Kernel:
        """The kernel of a key, allowed `shared_bytes` of dynamic shared memory."""
        from cupy.cuda import driver, function  # pyright: ignore[reportMissingImports]

        with self._lock:
            if key not in self._loaded:
                module = function.Module()
                module.load(self.cubin(key))
                overlaps = self._overlap and awaits_producers(key.source) and device_overlaps_kernels()
                self._loaded[key] = Kernel(module.get_function(key.source), overlaps)
            kernel = self._loaded[key]
            self._shared[key] = shared_bytes = max(shared_bytes, self._shared.get(key, 0))
            driver.funcSetAttribute(
                kernel.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes
            )
        return kernel


def _machine_code(stored: bytes) -> bytes:
    if not stored.startswith(b"\x7fELF"):
        raise KernelError("a stored cubin is no machine code")
    return stored


def device_arch() -> str:
    """What to compile for on the current device: see `architecture`."""
    import cupy  # pyright: ignore[reportMissingImports]

    capability = divmod(int(cupy.cuda.Device().compute_capability), 10)
    return architecture(capability, nvrtc.architectures())
