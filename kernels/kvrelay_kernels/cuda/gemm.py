"""Products of activations with weights: own kernels for rows that are no prompts, otherwise one of cuBLASLt's
algorithms, measured once and remembered."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.coded_matrix import CodedMatrix
from kvrelay_kernels.cuda.cublas_lt import Algorithm, CublasLt, Product, ProductShape
from kvrelay_kernels.cuda.expand_matrix import ExpandMatrix
from kvrelay_kernels.cuda.few_rows import FewRows
from kvrelay_kernels.cuda.module import KernelCache, device_arch
from kvrelay_kernels.cuda.stream_codes import StreamCodes
from kvrelay_kernels.cuda.stream_integers import StreamIntegers
from kvrelay_kernels.cuda.stream_rows import ARCHITECTURE, StreamRows
from kvrelay_kernels.errors import FormatUnsupported, KernelError
from kvrelay_kernels.interface import Activation
from kvrelay_kernels.plans import DeviceClass, GraphKey, PlanCache, PlanCounts, PlanStore, TensorKey
from kvrelay_kernels.quant.formats import Element

WORKSPACE_BYTES = 32 << 20
CANDIDATES = 8
"""Algorithms that are tried; the library offers no more."""
REPEATS = 5
LARGE = 1024
"""Rows from which on a card runs into its power limit: there a product is timed at full load. On an H200 the
fastest algorithm of a few runs was up to 10% slower than the best when it ran on and on."""
LOADED_MILLISECONDS = 20.0
FLUSH_BYTES = 256 << 20
"""Written between short products, so that their weights come from memory as they do in a model."""
SMALLEST_BUCKET, LARGEST_BUCKET = 16, 16384
PROOF_ROWS = 128
"""Rows of random numbers on which an algorithm has to give the bits of the first one."""
KEPT = 1024


@dataclass(frozen=True)
class CudaLinear:
    """A matrix on the device: `weight` `[n, k]` and `bias` `[n]` or None."""

    weight: Any
    """A `CodedMatrix`, or 16-bit elements seen as uint16, as the bias is."""
    bias: Any

    @property
    def coded(self) -> bool:
        """Whether it is a matrix of codes."""
        return isinstance(self.weight, CodedMatrix)

    @property
    def n(self) -> int:
        """Rows of the matrix: columns of a product with it."""
        return int(self.weight.shape[0])

    @property
    def k(self) -> int:
        """Columns of the matrix."""
        return int(self.weight.shape[1])

    def check_rows(self, rows: NDArray[np.int32]) -> None:
        """Raises IndexError for a row outside the matrix, which the device would read without a word."""
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.n:
            raise IndexError(f"rows must lie in 0..{self.n - 1}")


def row_bucket(rows: int) -> int:
    """The number of rows for which the algorithm of `rows` rows is chosen: the next power of two."""
    return min(max(SMALLEST_BUCKET, 1 << (rows - 1).bit_length()), LARGEST_BUCKET)


class Products:
    """`x @ weight.T (+ bias)`, sums in float32, on one stream at a time.

    There are kinds of products, which differ in the last bits; the bits of a row depend on its kind, but
    not on how many there are. Rows of prompts go by cuBLASLt: no algorithm cuts a sum into parts, and one is
    taken only if it gives the same bits as all others on random numbers. So a prompt's activations are the
    same in whichever chunks it is read. A matrix of codes is rounded to 16 bits for them, in scratch, which
    stays as large as the largest matrix that was.

    All other rows go by `StreamCodes` and, where the engine can copy the weight's rows, `StreamRows` on
    Hopper, elsewhere by `FewRows` if the weight is one of codes; otherwise as those of prompts. Products
    of up to 4 rows with integer codes on Hopper are a kind of their own, that of `StreamIntegers`.
    """

    def __init__(
        self,
        element: Element,
        kernels: KernelCache,
        plans: PlanStore,
        device: DeviceClass,
    ) -> None:
        """Raises BackendUnavailable where cuBLASLt is missing."""
        import cupy  # pyright: ignore[reportMissingImports]

        self._element: Element = element
        processors = device.processors or 1
        hopper = device_arch() == ARCHITECTURE
        self._codes = (StreamCodes if hopper else FewRows)(element, kernels, processors)
        self._integers = StreamIntegers(element, kernels, processors) if hopper else None
        self._streams = StreamRows(element, kernels, processors) if hopper else None
        self._expand = ExpandMatrix(element, kernels)
        self._scratch = cupy.empty(0, np.uint16)
        self._device = device
        self._lt = CublasLt()
        self._workspace = cupy.empty(WORKSPACE_BYTES, np.uint8)
        self._plans: PlanCache[Algorithm] = PlanCache(plans, KEPT)
        self._products: dict[ProductShape, Product] = {}
        self._chosen: dict[tuple[ProductShape, int], Algorithm] = {}
        self._expected = 0, 0

    @property
    def counts(self) -> PlanCounts:
        """How the choices were come by."""
        return self._plans.counts

    def gates(self, linear: CudaLinear, prompts: bool) -> bool:
        """Whether the product with a gated matrix takes its activation on the way to memory."""
        streams = self._streams is not None and self._streams.takes(linear.weight)
        return not prompts and (linear.coded or streams)

    def __call__(
        self, x: Any, linear: CudaLinear, out: Any, prompts: bool, activation: Activation | None = None
    ) -> None:
        """Write the product of `x` `[m, k]`, rows of prompts or not, to `out` `[m, n]`: uint16 or float32.

        With an `activation`, where it `gates`, `activation(gate) * up` of sums in float32: `[m, n / 2]`.
        """
        import cupy  # pyright: ignore[reportMissingImports]

        floats = out.dtype == np.float32
        if linear.coded and not prompts:
            self._multiply_codes(x, linear, out, activation)
            return
        if not prompts and self._streams is not None and self._streams.takes(linear.weight):
            self._streams.load(linear.weight, floats, self._expected[floats], activation)
            self._streams(x, linear.weight, linear.bias, out, activation)
            return
        if linear.coded:
            linear = CudaLinear(self._expanded(linear.weight), linear.bias)
        product = self._product(linear, out)
        algorithm = self._choice(product, linear, row_bucket(len(x)))
        bias = 0 if linear.bias is None else linear.bias.data.ptr
        product.run(
            algorithm, x.data.ptr, linear.weight.data.ptr, bias, out.data.ptr, len(x),
            self._workspace, cupy.cuda.get_current_stream().ptr,
        )  # fmt: skip

    def _multiply_codes(self, x: Any, linear: CudaLinear, out: Any, activation: Activation | None) -> None:
        """The product of rows that are no prompts with a matrix of codes."""
        weight, floats = linear.weight, out.dtype == np.float32
        rows = self._expected[floats]
        self._codes.load(weight, floats, rows, activation)
        product: Any = self._codes
        if self._integers is not None:
            self._integers.load(weight, floats, rows, activation)
            if self._integers.takes(weight, len(x)):
                product = self._integers
        product(x, weight, linear.bias, out, activation)

    def expect(self, rows: int, logit_rows: int) -> None:
        """Have the algorithms of a shape, when it is first met, chosen for up to so many rows at once."""
        self._expected = rows, logit_rows

    def _expanded(self, matrix: CodedMatrix) -> Any:
        """A matrix as 16-bit elements `[n, k]`, until the next one."""
        import cupy  # pyright: ignore[reportMissingImports]

        n, k = matrix.shape
        if self._scratch.size < n * k:
            self._scratch = cupy.empty(n * k, np.uint16)
        whole = self._scratch[: n * k].reshape(n, k)
        self._expand(matrix, whole)
        return whole

    def _product(self, linear: CudaLinear, out: Any) -> Product:
        import cupy  # pyright: ignore[reportMissingImports]

        element: Element = "float32" if out.dtype == np.float32 else self._element
        shape = ProductShape(linear.n, linear.k, self._element, element, linear.bias is not None)
        if shape not in self._products:
            self._products[shape] = Product(self._lt, shape, WORKSPACE_BYTES)
            most = self._expected[element == "float32"]
            bucket = SMALLEST_BUCKET
            while most and bucket <= row_bucket(most):
                self._choice(self._products[shape], linear, bucket)
                bucket *= 2
            cupy.get_default_memory_pool().free_all_blocks()
        return self._products[shape]

    def _choice(self, product: Product, linear: CudaLinear, bucket: int) -> Algorithm:
        key = product.shape, bucket
        if key not in self._chosen:
            plan = self._plans.get(
                self._key(product.shape, bucket), lambda: self._measure(product, linear, bucket), bytes, _load
            )
            self._chosen[key] = plan.value
        return self._chosen[key]

    def _key(self, shape: ProductShape, bucket: int) -> GraphKey:
        tensors = (
            TensorKey("x", shape.element, (bucket, shape.k), (shape.k, 1)),
            TensorKey("weight", shape.element, (shape.n, shape.k), (shape.k, 1)),
            TensorKey("out", shape.out, (bucket, shape.n), (shape.n, 1)),
        )
        return GraphKey.of(
            "gemm",
            self._device,
            tensors=tensors,
            attributes={"bias": shape.bias, "workspace": WORKSPACE_BYTES},
            libraries={"cublas_lt": str(self._lt.version)},
        )

    def _measure(self, product: Product, linear: CudaLinear, bucket: int) -> Algorithm:
        """The fastest algorithm for a bucket of rows among those that sum alike."""
        import cupy  # pyright: ignore[reportMissingImports]

        shape = product.shape
        rows = max(bucket, PROOF_ROWS)
        x = self._random_rows(rows, shape.k)
        out = cupy.empty((rows, shape.n), np.float32 if shape.out == "float32" else np.uint16)
        stream = cupy.cuda.get_current_stream()
        bias = 0 if linear.bias is None else linear.bias.data.ptr

        def run(algorithm: Algorithm, m: int) -> None:
            product.run(
                algorithm, x.data.ptr, linear.weight.data.ptr, bias, out.data.ptr, m,
                self._workspace, stream.ptr,
            )  # fmt: skip

        first = product.candidates(LARGEST_BUCKET, 1)
        if not first:
            raise FormatUnsupported(f"cuBLASLt has no way to compute {shape}")
        run(first[0], PROOF_ROWS)
        proof = out[:PROOF_ROWS].view(np.uint16).get()
        best, least = first[0], float("inf")
        for algorithm in [*first, *product.candidates(bucket, CANDIDATES)]:
            try:
                run(algorithm, PROOF_ROWS)
                if not np.array_equal(out[:PROOF_ROWS].view(np.uint16).get(), proof):
                    continue
                run(algorithm, bucket)
            except KernelError:
                continue  # the library offers some that it then refuses
            time = under_load if bucket >= LARGE else from_memory
            taken = time(lambda algorithm=algorithm: run(algorithm, bucket), stream)
            if taken < least:
                best, least = algorithm, taken
        return best

    def _random_rows(self, rows: int, k: int) -> Any:
        """Standard normal elements `[rows, k]`, every `PROOF_ROWS`-th row the same."""
        import cupy  # pyright: ignore[reportMissingImports]
        import ml_dtypes

        kind: Any = np.float16 if self._element == "float16" else ml_dtypes.bfloat16
        drawn = np.random.default_rng(k).standard_normal((PROOF_ROWS, k), np.float32).astype(kind)
        part = cupy.asarray(drawn.view(np.uint16))
        whole = cupy.empty((rows, k), np.uint16)
        for start in range(0, rows, PROOF_ROWS):
            whole[start : start + PROOF_ROWS] = part[: rows - start]
        return whole


def under_load(work: Callable[[], None], stream: Any) -> float:
    """Milliseconds of `work` when it is done again and again."""
    once = _elapsed(work, 1, stream)
    times = max(REPEATS, int(LOADED_MILLISECONDS / once))
    _elapsed(work, times, stream)
    return _elapsed(work, times, stream)


def from_memory(work: Callable[[], None], stream: Any) -> float:
    """Milliseconds of `work`, the median of several runs that find nothing in the cache."""
    import cupy  # pyright: ignore[reportMissingImports]

    other = cupy.empty(FLUSH_BYTES, np.uint8)
    times: list[float] = []
    for _ in range(REPEATS):
        other.data.memset_async(0, FLUSH_BYTES, stream)
        times.append(_elapsed(work, 1, stream))
    return median(times)


def _elapsed(work: Callable[[], None], times: int, stream: Any) -> float:
    import cupy  # pyright: ignore[reportMissingImports]

    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    begin.record(stream)
    for _ in range(times):
        work()
    end.record(stream)
    end.synchronize()
    return cupy.cuda.get_elapsed_time(begin, end) / times


def _load(data: bytes) -> Algorithm:
    return Algorithm.from_buffer_copy(data)
