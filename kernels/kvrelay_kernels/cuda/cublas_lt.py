"""cuBLASLt's matrix product through ctypes: just what a decoder's weights need."""

import ctypes
from ctypes import byref, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

from kvrelay_kernels.cuda.wheels import nvidia_library
from kvrelay_kernels.errors import KernelError
from kvrelay_kernels.quant.formats import Element

# Numbers of the C API (cublasLt.h, library_types.h).
_TYPES: dict[Element, int] = {"float32": 0, "float16": 2, "bfloat16": 14}
_COMPUTE_32F, _TRANSPOSED = 68, 1
_DESC_TRANSA, _DESC_EPILOGUE, _DESC_BIAS_POINTER = 3, 7, 8
_EPILOGUE_BIAS = 4
_LAYOUT_COLUMNS = 3
_PREFERENCE_WORKSPACE, _PREFERENCE_REDUCTIONS = 1, 3
_STATUS = {
    1: "not initialized",
    3: "out of memory",
    7: "invalid value",
    13: "execution failed",
    15: "not supported",
}


class Algorithm(ctypes.Structure):
    """One way to compute a product: 64 opaque bytes, of meaning to one version on one device."""

    _fields_ = [("data", c_uint64 * 8)]


class _Heuristic(ctypes.Structure):
    _fields_ = [
        ("algorithm", Algorithm),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", ctypes.c_float),
        ("reserved", c_int * 4),
    ]


def check(status: int) -> None:
    """Raises KernelError unless `status` is success."""
    if status:
        raise KernelError(f"cuBLASLt failed: {_STATUS.get(status, 'status')} ({status})")


class CublasLt:
    """The library with a handle on the current device.

    Raises:
        BackendUnavailable: the library is missing.
    """

    def __init__(self) -> None:
        self.library = nvidia_library(
            "cublasLt", (13, 12), "pip install nvidia-cublas (CUDA 13) or nvidia-cublas-cu12"
        )
        self.library.cublasLtGetVersion.restype = c_size_t
        self.version = int(self.library.cublasLtGetVersion())
        self.library.cublasLtMatmul.argtypes = [
            c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p,
            c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_size_t, c_void_p,
        ]  # fmt: skip
        self.handle = c_void_p()
        check(self.library.cublasLtCreate(byref(self.handle)))


@dataclass(frozen=True)
class ProductShape:
    """`out[m, n] = x[m, k] @ weight[n, k].T (+ bias[n])` for any m, all of them row-major."""

    n: int
    k: int
    element: Element
    """Of x, weight and bias; sums are float32."""
    out: Element
    bias: bool


class Product:
    """Descriptors of one shape. They live as long as the process: shapes are few, one a kind of layer."""

    def __init__(self, lt: CublasLt, shape: ProductShape, workspace_bytes: int) -> None:
        self.shape = shape
        self._lt = lt
        self._columns = 0
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)
        library = lt.library
        self._operation = c_void_p()
        check(library.cublasLtMatmulDescCreate(byref(self._operation), _COMPUTE_32F, _TYPES["float32"]))
        self._describe(_DESC_TRANSA, c_int32(_TRANSPOSED))
        if shape.bias:
            self._describe(_DESC_EPILOGUE, c_uint32(_EPILOGUE_BIAS))
        # The library counts in columns: row-major x[m, k] is its k x m matrix, the product its n x m one.
        self._weight = self._layout(shape.element, shape.k, shape.n)
        self._x = self._layout(shape.element, shape.k, 1)
        self._out = self._layout(shape.out, shape.n, 1)
        self._preference = c_void_p()
        check(library.cublasLtMatmulPreferenceCreate(byref(self._preference)))
        self._prefer(_PREFERENCE_WORKSPACE, c_uint64(workspace_bytes))
        self._prefer(_PREFERENCE_REDUCTIONS, c_uint32(0))  # no sum is cut into parts

    def candidates(self, m: int, most: int) -> list[Algorithm]:
        """At most so many ways to compute `m` rows, the library's favourite first."""
        self._set_rows(m)
        found, count = (_Heuristic * most)(), c_int()
        status = self._lt.library.cublasLtMatmulAlgoGetHeuristic(
            self._lt.handle, self._operation, self._weight, self._x, self._out, self._out,
            self._preference, most, found, byref(count),
        )  # fmt: skip
        if status and not count.value:
            check(status)
        return [Algorithm.from_buffer_copy(bytes(h.algorithm)) for h in found[: count.value] if h.state == 0]

    def run(
        self,
        algorithm: Algorithm,
        x: int,
        weight: int,
        bias: int,
        out: int,
        m: int,
        workspace: Any,
        stream: int,
    ) -> None:
        """Compute `m` rows on `stream`; the operands are addresses.

        Raises:
            KernelError: the algorithm cannot do it.
        """
        self._set_rows(m)
        if self.shape.bias:
            self._describe(_DESC_BIAS_POINTER, c_uint64(bias))
        check(
            self._lt.library.cublasLtMatmul(
                self._lt.handle, self._operation, byref(self._one), weight, self._weight, x, self._x,
                byref(self._zero), out, self._out, out, self._out, byref(algorithm),
                workspace.data.ptr, workspace.nbytes, stream,
            )
        )  # fmt: skip

    def _describe(self, attribute: int, value: Any) -> None:
        size = c_size_t(ctypes.sizeof(value))
        check(self._lt.library.cublasLtMatmulDescSetAttribute(self._operation, attribute, byref(value), size))

    def _prefer(self, attribute: int, value: Any) -> None:
        size = c_size_t(ctypes.sizeof(value))
        check(
            self._lt.library.cublasLtMatmulPreferenceSetAttribute(
                self._preference, attribute, byref(value), size
            )
        )

    def _layout(self, element: Element, rows: int, columns: int) -> c_void_p:
        layout = c_void_p()
        create = self._lt.library.cublasLtMatrixLayoutCreate
        check(create(byref(layout), _TYPES[element], c_uint64(rows), c_uint64(columns), ctypes.c_int64(rows)))
        return layout

    def _set_rows(self, m: int) -> None:
        if m == self._columns:
            return
        value = c_uint64(m)
        for layout in (self._x, self._out):
            check(
                self._lt.library.cublasLtMatrixLayoutSetAttribute(
                    layout, _LAYOUT_COLUMNS, byref(value), c_size_t(ctypes.sizeof(value))
                )
            )
        self._columns = m
