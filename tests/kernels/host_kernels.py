"""CUDA kernels compiled as C++ by g++ and run on this processor, called as CuPy's kernels are."""

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kvrelay_kernels.cuda.module import SOURCES, KernelKey

SHIM = Path(__file__).parent / "cuda_on_cpu"
COMPILER = shutil.which("g++")


class HostKernels:
    """Takes the place of a `KernelCache`; arrays are NumPy's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: dict[KernelKey, HostKernel] = {}

    def load(self, key: KernelKey, shared_bytes: int) -> "HostKernel":
        """The kernel of a key, compiled once."""
        if key not in self._loaded:
            self._loaded[key] = HostKernel(key, Path(tempfile.mkdtemp(prefix=key.source, dir=self._folder)))
        return self._loaded[key]


class HostKernel:
    """One kernel in a shared library."""

    def __init__(self, key: KernelKey, folder: Path) -> None:
        # Quoted includes are looked for beside the file that has them: the shim's primitives must lie there.
        for file in (SOURCES / f"{key.source}.cu", *SOURCES.glob("*.cuh"), *SHIM.iterdir()):
            shutil.copy(file, folder)
        library = folder / "kernel.so"
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", f"-DKERNEL={key.source}"]
        macros = [f"-D{name}={value}" for name, value in key.constants]
        assert COMPILER is not None
        command = [COMPILER, *flags, *macros, "launch.cpp", "-o", str(library)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"g++ refused {key}: {done.stderr}")
        self._launch = ctypes.CDLL(str(library)).launch

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """Run a grid; arrays are passed by their addresses, Python's integers as 64 bits."""
        columns, rows = (*grid, 1)[:2]
        values = [np.array([_value(arg)]) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*[value.ctypes.data for value in values])
        if self._launch(columns, rows, block[0], pointers):
            raise RuntimeError("threads of a block wait at different barriers")


def _value(arg: Any) -> Any:
    if isinstance(arg, np.ndarray):
        assert arg.flags.c_contiguous
        return np.int64(arg.ctypes.data)
    return arg if isinstance(arg, np.generic) else np.int64(arg)
