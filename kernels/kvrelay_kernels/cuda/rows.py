"""Launchers of the kernels that work on rows one by one: embedding, norms, gate, moving and rotating rows."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kvrelay_kernels.cuda.activation import gated
from kvrelay_kernels.cuda.coded_matrix import ELEMENTS, CodedMatrix, Form
from kvrelay_kernels.cuda.module import KernelCache, KernelKey, device_arch
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import Activation
from kvrelay_kernels.quant.formats import Element
from kvrelay_kernels.quant.rotation import run_length

WIDEST = 32768
"""Columns that a norm can hold in registers."""
GATE_THREADS = 256
ROTATE_THREADS = 256
UNIT_BYTES = 16


@dataclass(frozen=True)
class NormShape:
    """What a norm is compiled for."""

    width: int
    residual: bool
    """x is float32: the residual stream. Otherwise 16 bit."""
    add: bool
    """y is added, and the sum written."""
    element: Element

    def __post_init__(self) -> None:
        if self.width % 4 or self.width > WIDEST:
            raise FormatUnsupported(f"rows of {self.width} columns: a multiple of 4 up to {WIDEST} is needed")

    @property
    def threads(self) -> int:
        """Threads of a block: four vectors of four columns each, as far as that fills whole warps."""
        return min(1024, -(-self.width // (16 * 32)) * 32)

    def key(self, arch: str) -> KernelKey:
        """The kernel."""
        constants = {
            "WIDTH": self.width,
            "THREADS": self.threads,
            "RESIDUAL": self.residual,
            "ADD": self.add,
            "BFLOAT": self.element == "bfloat16",
        }
        return KernelKey.of("rms_norm", constants, arch)


def embed_key(form: Form, element: Element, arch: str) -> KernelKey:
    """The kernel that looks rows up in a form of table."""
    return KernelKey.of("embed", form.constants | {"BFLOAT": element == "bfloat16"}, arch)


def gate_key(activation: Activation, element: Element, arch: str) -> KernelKey:
    """The kernel of one activation."""
    constants = {"GATED": gated(activation), "BFLOAT": element == "bfloat16"}
    return KernelKey.of("gate", constants, arch)


def move_key(scatter: bool, arch: str) -> KernelKey:
    """The kernel that gathers rows, or scatters them."""
    return KernelKey.of("move_rows", {"SCATTER": scatter}, arch)


def rotate_key(run: int, element: Element, arch: str) -> KernelKey:
    """The kernel that rotates runs of so many elements."""
    return KernelKey.of("rotate_rows", {"RUN": run, "BFLOAT": element == "bfloat16"}, arch)


class RowKernels:
    """The kernels for one element type, on CuPy's current stream; every array is contiguous."""

    def __init__(self, element: Element, kernels: KernelCache) -> None:
        self._element: Element = element
        arch = device_arch()

        @cache
        def load(key: KernelKey) -> Any:
            return kernels.load(key, 0)

        @cache
        def norm(width: int, residual: bool, add: bool) -> tuple[Any, int]:
            shape = NormShape(width, residual, add, element)
            return load(shape.key(arch)), shape.threads

        self._load, self._norm, self._arch = load, norm, arch

    def embed(self, table: Any, ids: Any, scale: float, out: Any, newest: Any = None) -> None:
        """`out[i] = table[ids[i]] * scale`: uint16 `[n, width]`, or codes -> float32 `[rows, width]`.

        In place of an id may stand ~place: the one that `newest` has there.
        """
        coded = isinstance(table, CodedMatrix)
        kernel = self._load(embed_key(table.form if coded else ELEMENTS, self._element, self._arch))
        width = out.shape[1]
        threads = min(512, -(-width // 128) * 32)
        data = (table.codes, table.factors) if coded else (table, 0)
        unit = table.unit if coded else 1
        sources = *data, ids, 0 if newest is None else newest
        kernel((len(out),), (threads,), (*sources, np.float32(scale * unit), np.int32(width), out))

    def norm(self, x: Any, weight: Any, eps: float, out: Any, y: Any = None, total: Any = None) -> None:
        """RMS norm of `x`, or of `x + y`, which goes to `total` then; float32 `x` is a residual stream."""
        kernel, threads = self._norm(x.shape[1], x.dtype == np.float32, y is not None)
        none = 0
        kernel(
            (len(x),), (threads,),
            (x, none if y is None else y, weight, np.float32(eps), none if total is None else total, out),
        )  # fmt: skip

    def gate(self, gate_up: Any, activation: Activation, out: Any) -> None:
        """`activation(gate) * up`: uint16 `[rows, 2 * width]` -> `[rows, width]`.

        `gate_up` is the product with a gated matrix (`gated_order`): 8 columns of each by turns.
        """
        kernel = self._load(gate_key(activation, self._element, self._arch))
        rows, width = out.shape
        blocks = -(-width // (8 * GATE_THREADS))
        kernel((blocks, rows), (GATE_THREADS,), (gate_up, np.int32(width), out))

    def rotate(self, x: Any, head_dim: int) -> None:
        """Rotate the heads of `x`, uint16 `[rows, heads * head_dim]`, in place; it undoes itself."""
        kernel = self._load(rotate_key(run_length(head_dim), self._element, self._arch))
        blocks = -(-x.size // (8 * ROTATE_THREADS))
        kernel((blocks,), (ROTATE_THREADS,), (x, np.int64(x.size)))

    def gather(self, x: Any, rows: Any, out: Any) -> None:
        """`out[i] = x[rows[i]]`."""
        self._move(False, len(out), x, rows, out)

    def scatter(self, x: Any, rows: Any, out: Any) -> None:
        """`out[rows[i]] = x[i]`."""
        self._move(True, len(x), x, rows, out)

    def _move(self, scatter: bool, count: int, x: Any, rows: Any, out: Any) -> None:
        units = x.nbytes // len(x) // UNIT_BYTES
        threads = min(256, -(-units // 32) * 32)
        self._load(move_key(scatter, self._arch))((count,), (threads,), (x, rows, np.int32(units), out))
