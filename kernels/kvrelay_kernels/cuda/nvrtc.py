"""NVIDIA's run-time compiler through ctypes: CUDA C++ in, machine code out. Needs no GPU."""

import ctypes
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from kvrelay_kernels.errors import BackendUnavailable, KernelError


class CompileFailed(KernelError):
    """NVRTC refused a source; the message is its log."""


@cache
def library() -> ctypes.CDLL:
    """NVRTC from the `nvidia-cuda-nvrtc` wheel, or else from where the system's loader looks.

    Raises:
        BackendUnavailable: neither is there.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    names = [str(path) for folder in folders for path in sorted(folder.glob("*/lib/libnvrtc.so.*[0-9]"))]
    for name in [*names, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BackendUnavailable("NVRTC is missing: pip install nvidia-cuda-nvrtc (or the cuda13 / cuda12 extra)")


def version() -> str:
    """NVRTC's version, such as `13.0`."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


@cache
def architectures() -> tuple[int, ...]:
    """Compute capabilities, times ten, that NVRTC compiles for. Raises BackendUnavailable."""
    count = ctypes.c_int()
    library().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    library().nvrtcGetSupportedArchs(found)
    return tuple(found)


def compile_cubin(source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
    """Machine code of `source`; `headers` are the texts that its `#include "name"` lines find.

    Raises:
        BackendUnavailable: there is no NVRTC.
        CompileFailed: with the compiler's log.
    """
    nvrtc, program = library(), ctypes.c_void_p()
    names = (ctypes.c_char_p * len(headers))(*[name.encode() for name in headers])
    texts = (ctypes.c_char_p * len(headers))(*[text.encode() for text in headers.values()])
    if nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"kernel.cu", len(headers), texts, names
    ):
        raise CompileFailed("NVRTC could not create a program")
    try:
        flags = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        failed = nvrtc.nvrtcCompileProgram(program, len(options), flags)
        size = ctypes.c_size_t()
        if failed:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CompileFailed(f"{' '.join(options)}\n{log.value.decode()}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
