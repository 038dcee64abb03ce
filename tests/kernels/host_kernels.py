"""CUDA kernels compiled as C++ by g++ and run on this processor, called as CuPy's kernels are."""

import ctypes
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.module import SOURCES, KernelKey

SHIM = Path(__file__).parent / "cuda_on_cpu"
COMPILER = shutil.which("g++")
_DYNAMIC_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")


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
    """One kernel in a shared library; its thread blocks run one behind the other."""

    def __init__(self, key: KernelKey, folder: Path) -> None:
        # Quoted includes are looked for beside the file that has them: the shim's primitives must lie there.
        for file in (SOURCES / f"{key.source}.cu", *SOURCES.glob("*.cuh")):
            text = _DYNAMIC_SHARED.sub(
                r"static \1* const \2 = reinterpret_cast<\1*>(host::shared);", file.read_text()
            )
            (folder / file.name).write_text(text)
        for file in SHIM.iterdir():
            shutil.copy(file, folder)
        library = folder / "kernel.so"
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-w", "-shared", "-fPIC"]
        macros = {
            "KERNEL": key.source,
            "__CUDA_ARCH__": 10 * int(key.arch.removeprefix("sm_").rstrip("af")),
            **dict(key.constants),
        }
        assert COMPILER is not None
        command = [COMPILER, *flags, *[f"-D{name}={value}" for name, value in macros.items()], "launch.cpp"]
        done = subprocess.run(
            [*command, "-o", str(library)], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"g++ refused {key}: {done.stderr}")
        self._launch = ctypes.CDLL(str(library)).launch
        self._launch.restype = ctypes.c_char_p

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared_mem: int = 0
    ) -> None:
        """Run a grid; arrays are passed by their addresses, Python's integers as 64 bits.

        Raises RuntimeError where threads wait for each other in vain, or where shared memory is misused.
        """
        columns, rows = (*grid, 1)[:2]
        values = [np.array([_value(arg)]) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*[value.ctypes.data for value in values])
        if fault := self._launch(columns, rows, block[0], shared_mem, pointers):
            raise RuntimeError(fault.decode())


def box_map(array: NDArray[np.uint8], box_rows: int) -> NDArray[np.uint64]:
    """In place of `tensor_map`: a contiguous array as rows of 128 bytes, in boxes of `box_rows` of them."""
    return np.array([array.ctypes.data, array.nbytes, box_rows], np.uint64)


def matrix_map(matrix: NDArray[np.uint16], box_rows: int) -> np.void:
    """In place of that of `tensor_map`: a contiguous matrix, in boxes of `box_rows` rows by 64 columns."""
    assert matrix.flags.c_contiguous
    assert matrix.shape[1] % 8 == 0
    words = np.zeros(16, np.uint64)
    words[:4] = matrix.ctypes.data, *matrix.shape, box_rows
    return np.void(words.tobytes())


def planes_map(array: NDArray[Any], box: tuple[int, int], parts: int = 1) -> np.void:
    """In place of that of `tensor_map`, with the same arguments."""
    assert array.flags.c_contiguous
    planes, rows = array.shape[:2]
    words = np.zeros(16, np.uint64)
    width = array.nbytes // (planes * rows)
    words[:7] = array.ctypes.data, planes, rows, width, *box, width // parts
    return np.void(words.tobytes())


def blocks_map(
    address: int, blocks: int, block_bytes: int, shape: tuple[int, int, int]
) -> NDArray[np.uint64]:
    """In place of `block_map`, with the same arguments."""
    return np.array([address, blocks, block_bytes, *shape], np.uint64)


def _value(arg: Any) -> Any:
    if isinstance(arg, np.ndarray):
        assert arg.flags.c_contiguous
        return np.int64(arg.ctypes.data)
    return arg if isinstance(arg, np.generic) else np.int64(arg)
