"""Kernels by key: source, constants and architecture name a cubin, kept on disk and loaded once."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvrelay_kernels.cuda import nvrtc

SOURCES = Path(__file__).parent / "sources"

Constants = Mapping[str, int | bool]
"""Macros that a source is compiled with."""


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
    def digest(self) -> str:
        """Hash over the key, every source text and the compiler's version."""
        parts = [
            *self.options,
            nvrtc.version(),
            self.source,
            *_headers(),
            *_headers().values(),
            _text(self.source),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@cache
def _headers() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(SOURCES.glob("*.cuh"))}


@cache
def _text(source: str) -> str:
    return (SOURCES / f"{source}.cu").read_text()


def compile_kernel(key: KernelKey) -> bytes:
    """The cubin of a key, from the compiler. Raises BackendUnavailable or CompileFailed."""
    return nvrtc.compile_cubin(_text(key.source), _headers(), key.options)


class KernelCache:
    """Loaded kernels of this process's current device; cubins stay in `directory`, if one is given."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._loaded: dict[KernelKey, Any] = {}
        self._shared: dict[KernelKey, int] = {}

    def cubin(self, key: KernelKey) -> bytes:
        """The cubin, from disk or from the compiler."""
        if self._directory is None:
            return compile_kernel(key)
        path = self._directory / f"{key.source}-{key.arch}-{key.digest[:32]}.cubin"
        if path.exists():
            return path.read_bytes()
        cubin = compile_kernel(key)
        self._directory.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_bytes(cubin)
        draft.replace(path)  # another process may be writing the same file
        return cubin

    def load(self, key: KernelKey, shared_bytes: int) -> Any:
        """The `cupy.cuda.function.Function` of a key, allowed `shared_bytes` of dynamic shared memory."""
        from cupy.cuda import driver, function  # pyright: ignore[reportMissingImports]

        if key not in self._loaded:
            module = function.Module()
            module.load(self.cubin(key))
            self._loaded[key] = module.get_function(key.source)
        kernel = self._loaded[key]
        self._shared[key] = shared_bytes = max(shared_bytes, self._shared.get(key, 0))
        driver.funcSetAttribute(
            kernel.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes
        )
        return kernel


def device_arch() -> str:
    """Architecture to compile for on the current device: `sm_90a` on Hopper, with its own instructions."""
    import cupy  # pyright: ignore[reportMissingImports]

    capability = cupy.cuda.Device().compute_capability
    return f"sm_{capability}{'a' if capability == '90' else ''}"
