"""Products of few rows on the GPU: time and bandwidth by shape, rows and form of weight, cuBLASLt beside.

    python -m benchmarks.few_rows [--quick] [--commit NAME]

Times are of one product under CUDA-graph replay, microseconds; copies of the weight take turns, together
beyond the second-level cache. Kernels that stream begin before the one ahead has ended, as in a model.
GB/s count the weight's bytes, scales and biases with them, and the fraction is of the bandwidth that a kernel
which only reads reaches in the same run. Errors are against float64 on the values that the codes stand for,
of float32 results. Writes results/h200/few_rows.json.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cupy  # pyright: ignore[reportMissingImports]
import numpy as np

from benchmarks.decode_attention import BEYOND_CACHE, bfloat16_bits, from_bfloat16, read_bandwidth, replay
from benchmarks.machine import RESULTS, gpu_provenance, write
from kvrelay_kernels.cuda.coded_matrix import CodedMatrix
from kvrelay_kernels.cuda.device import find_gpu
from kvrelay_kernels.cuda.few_rows import FewRows
from kvrelay_kernels.cuda.gemm import CudaLinear, Products
from kvrelay_kernels.cuda.module import KernelCache
from kvrelay_kernels.cuda.rows import RowKernels
from kvrelay_kernels.cuda.stream_codes import StreamCodes
from kvrelay_kernels.cuda.stream_integers import StreamIntegers
from kvrelay_kernels.cuda.stream_rows import StreamRows
from kvrelay_kernels.cuda.weights import WeightLoader
from kvrelay_kernels.interface import WeightMode
from kvrelay_kernels.plans import PlanStore
from kvrelay_kernels.quant.weights import quantize_weight

PATH = RESULTS / "h200" / "few_rows.json"
PACKAGES = ("numpy", "cupy-cuda13x", "nvidia-cublas")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
MOST_COPIES = 32
PROOF_COLUMNS = 256
"""Rows of a weight whose results are checked."""


@dataclass(frozen=True)
class Shape:
    """A weight of a model."""

    name: str
    n: int
    k: int
    logits: bool = False


SHAPES = [
    Shape("llama-8b qkv", 6144, 4096),
    Shape("llama-8b o", 4096, 4096),
    Shape("llama-8b gate, up", 28672, 4096),
    Shape("llama-8b down", 4096, 14336),
    Shape("llama-8b head", 128256, 4096, logits=True),
    Shape("qwen3-4b qkv", 6144, 2560),
    Shape("qwen3-4b o", 2560, 4096),
    Shape("qwen3-4b gate, up", 19456, 2560),
    Shape("qwen3-4b down", 2560, 9728),
    Shape("qwen3-4b head", 151936, 2560, logits=True),
]
MODES: dict[str, WeightMode] = {"16": "float", "int8": "int8", "fp8": "fp8", "int4": "int4"}
FORMS = [*MODES, "int4 exact", "int8 g16 exact"]
"""`exact`: scales that float16 does not have, as in GGUF's Q4_K and Q6_K."""


def normal(rows: int, columns: int) -> Any:
    """Standard normal float32 numbers, all there: the generator may have another stream than their reader."""
    drawn = cupy.random.standard_normal((rows, columns), np.float32)
    cupy.cuda.Device().synchronize()
    return drawn


class Bench:
    """One weight in one form, in as many copies as do not fit the cache."""

    def __init__(self, shape: Shape, form: str, kernels: KernelCache, stream: Any) -> None:
        self.shape, self.form, self.stream = shape, form, stream
        gpu = find_gpu()
        self.few = FewRows("bfloat16", kernels, gpu.processors)
        self.streams = StreamRows("bfloat16", kernels, gpu.processors)
        self.codes = StreamCodes("bfloat16", kernels, gpu.processors)
        self.integers = StreamIntegers("bfloat16", kernels, gpu.processors)
        self.products = Products("bfloat16", kernels, PlanStore(), gpu.device_class)
        self.rows = RowKernels("bfloat16", kernels)
        values = normal(shape.n, shape.k)
        values *= np.float32(shape.k**-0.5)
        part: Any = values
        if form.endswith("exact"):
            part = quantize_weight(values, *((8, 16) if "g16" in form else (4, 32)))
        weight = WeightLoader("bfloat16", kernels).matrix([part], MODES.get(form, "auto"), None).weight
        self.nbytes = int(weight.nbytes)
        count = int(min(MOST_COPIES, np.ceil(BEYOND_CACHE / self.nbytes)))
        self.weights = [weight, *[self._copy(weight) for _ in range(count - 1)]]

    @staticmethod
    def _copy(weight: Any) -> Any:
        if not isinstance(weight, CodedMatrix):
            return weight.copy()
        return replace(weight, codes=weight.codes.copy(), factors=weight.factors.copy())

    def contenders(self, rows: int) -> dict[str, Callable[[Any, Any, Any], None]]:
        """By name: what writes a product of so many rows of x with a weight."""
        found: dict[str, Callable[[Any, Any, Any], None]] = {
            "few_rows": lambda x, w, out: self.few(x, w, None, out)
        }
        if self.form == "16":
            found["stream_rows"] = lambda x, w, out: self.streams(x, w, None, out)
            found["cublasLt"] = lambda x, w, out: self.products(x, CudaLinear(w, None), out, prompts=True)
        else:
            found["stream_codes"] = lambda x, w, out: self.codes(x, w, None, out)
            if self.integers.takes(self.weights[0], rows):
                found["stream_integers"] = lambda x, w, out: self.integers(x, w, None, out)
        return found

    def run(self, rows: int) -> list[dict[str, Any]]:
        """Time and check every contender."""
        n, k = self.shape.n, self.shape.k
        x = bfloat16_bits(normal(rows, k))
        kind = np.float32 if self.shape.logits else np.uint16
        found: list[dict[str, Any]] = []
        for name, product in self.contenders(rows).items():
            outs = [cupy.full((rows, n), 0xFF, kind) for _ in self.weights]
            calls = [
                lambda w=w, out=out, f=product: f(x, w, out)
                for w, out in zip(self.weights, outs, strict=True)
            ]
            times = replay(calls, self.stream)
            with self.stream:  # also the poison: on another stream it may come behind the product
                sums = cupy.full((rows, n), np.nan, np.float32)
                product(x, self.weights[-1], sums)
                error = self._error(x, sums)
            found.append({
                "shape": self.shape.name, "n": n, "k": k, "form": self.form, "rows": rows, "contender": name,
                "microseconds": asdict(times), "bytes": self.nbytes,
                "bytes_per_second": self.nbytes / times.median * 1e6, "relative_error": error,
            })  # fmt: skip
        return found

    def _error(self, x: Any, sums: Any) -> float:
        """Of the last `PROOF_COLUMNS` columns: the matrix's last rows, which fill no whole band."""
        first = self.shape.n - PROOF_COLUMNS
        weight = self.weights[-1]
        if isinstance(weight, CodedMatrix):
            values = cupy.empty((PROOF_COLUMNS, self.shape.k), np.float32)
            ids = cupy.asarray(np.arange(first, self.shape.n, dtype=np.int32))
            self.rows.embed(weight, ids, 1.0, values)
        else:
            values = from_bfloat16(weight[first:])
        wanted = from_bfloat16(x).astype(np.float64) @ values.astype(np.float64).T
        return float(cupy.linalg.norm(sums[:, first:] - wanted) / cupy.linalg.norm(wanted))


def main() -> None:
    """Measure, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="Llama's layers at 1 and 32 rows, no file")
    parser.add_argument("--commit", help="name of the commit, where the checkout has no repository")
    parser.add_argument("--out", type=Path, default=PATH)
    options = parser.parse_args()

    stream = cupy.cuda.Stream(non_blocking=True)
    stream.use()
    kernels = KernelCache()
    head = gpu_provenance(PACKAGES, options.commit)
    peak = read_bandwidth(stream)
    cupy.get_default_memory_pool().free_all_blocks()
    print(f"read bandwidth {peak / 1e12:.3f} TB/s")
    shapes, counts = (SHAPES[:4], (1, 32)) if options.quick else (SHAPES, ROWS)
    results: list[dict[str, Any]] = []
    print(f"{'weight':20} {'form':15} rows {'contender':15}       us    least     most  GB/s of read  error")
    for shape in shapes:
        for form in FORMS:
            bench = Bench(shape, form, kernels, stream)
            for rows in counts:
                for row in bench.run(rows):
                    row["fraction_of_read"] = row["bytes_per_second"] / peak
                    results.append(row)
                    times = row["microseconds"]
                    print(
                        f"{shape.name:20} {form:15} {rows:4} {row['contender']:15}"
                        f" {times['median']:8.2f} {times['least']:8.2f} {times['most']:8.2f}"
                        f" {row['bytes_per_second'] / 1e9:5.0f} {row['fraction_of_read']:7.1%}"
                        f" {row['relative_error']:.1e}",
                        flush=True,
                    )
            del bench
            cupy.get_default_memory_pool().free_all_blocks()
        if not options.quick:
            write({**head, "read_bytes_per_second": peak, "rows": results}, options.out)


if __name__ == "__main__":
    main()
