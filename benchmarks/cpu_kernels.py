"""How near do the CPU backend's operations come to what the machine allows? Shapes of SmolLM2-135M.

The floor of an operation is the longer of: its bytes at the bandwidth, its multiply-adds at the rate that
this script measures first. Weights are rotated over as many copies as the model has layers, so that they
come from memory and not from a cache. Best of many repeats, since other processes only ever add time.

    python benchmarks/cpu_kernels.py --out benchmarks/results/cpu_kernels.json
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numba
import numpy as np

from kvrelay_kernels.cpu.backend import CpuBackend
from kvrelay_kernels.cpu.products import TILE_LANES, TILE_ROWS, multiply
from kvrelay_kernels.interface import AttentionSpec, RopeTable, StepBatch
from kvrelay_kernels.quant import BLOCK_TOKENS, AffineWeight, BlockLayout, parse_format

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 30, 576, 1536, 9, 3, 64, 49152
SPEC = AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5)
LINEARS = {
    "qkv": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, 4, LAYERS),
    "o": (HIDDEN, HEADS * HEAD_DIM, 4, LAYERS),
    "gate_up": (2 * FFN, HIDDEN, 4, LAYERS),
    "down": (HIDDEN, FFN, 4, LAYERS),
    "head": (VOCABULARY, HIDDEN, 8, 1),
}


@dataclass(frozen=True)
class Result:
    """One operation: seconds a call (best and median) beside its floor in seconds."""

    operation: str
    rows: int
    calls_per_step: int
    best: float
    median: float
    floor: float
    gigabytes_per_second: float
    gigaflops: float


@numba.njit(parallel=True, fastmath=True)
def _sum(x: np.ndarray) -> float:
    total = 0.0
    for i in numba.prange(len(x)):
        total += x[i]
    return total


@numba.njit(parallel=True)
def _multiply_adds(x: np.ndarray, w: np.ndarray, out: np.ndarray, times: int, threads: int) -> None:
    for thread in numba.prange(threads):
        for _ in range(times):
            multiply(
                x[thread],
                0,
                128,
                w[thread],
                0,
                TILE_LANES,
                out[thread],
                0,
                TILE_LANES,
                TILE_ROWS,
                128,
                TILE_LANES,
                True,
            )


def _times(call: Callable[[], object], seconds: float, calls: int = 1) -> tuple[float, float]:
    """Best and median seconds of one of the `calls` that `call` makes."""
    call()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        found.append((time.perf_counter() - begin) / calls)
    return min(found), float(np.median(found))


def _ceilings(threads: int) -> tuple[float, float]:
    """Bytes a second of a long sum, and floating-point operations a second of the innermost tile."""
    data = np.ones(1 << 26, np.float32)
    bandwidth = data.nbytes / _times(lambda: _sum(data), 1.0)[0]
    x, w = (np.ones((threads, n), np.float32) for n in (TILE_ROWS * 128, 128 * TILE_LANES))
    out = np.empty((threads, TILE_ROWS * TILE_LANES), np.float32)
    seconds = _times(lambda: _multiply_adds(x, w, out, 2000, threads), 1.0)[0]
    return bandwidth, 2.0 * 2000 * threads * TILE_ROWS * TILE_LANES * 128 / seconds


def _batch(lengths: list[int], new: int) -> StepBatch:
    """A step that brings `new` rows to each sequence, up to the given lengths."""
    count = len(lengths)
    blocks = -(-max(lengths) // BLOCK_TOKENS)
    tables = np.arange(count * blocks, dtype=np.int32).reshape(count, blocks)
    positions = np.concatenate([np.arange(length - new, length) for length in lengths]).astype(np.int32)
    starts = (np.arange(count + 1) * new).astype(np.int32)
    return StepBatch(
        np.zeros(count * new, np.int32),
        positions,
        starts,
        np.array(lengths, np.int32),
        tables,
        starts[1:] - 1,
    )


class Bench:
    """Measures operations and collects their results."""

    def __init__(self, threads: int, seconds: float) -> None:
        self.backend = CpuBackend(threads)
        self.seconds = seconds
        self.rng = np.random.default_rng(0)
        self.bandwidth, self.flops = _ceilings(threads)
        self.results: list[Result] = []

    def floats(self, *shape: int) -> np.ndarray:
        """Normal float32 numbers."""
        return self.rng.standard_normal(shape, np.float32)

    def add(
        self,
        operation: str,
        rows: int,
        per_step: int,
        nbytes: float,
        flops: float,
        call: Callable[[], object],
        calls: int,
    ) -> None:
        """Time `calls` calls made by `call`, each of so many bytes and operations."""
        best, median = _times(call, self.seconds, calls)
        floor = max(nbytes / self.bandwidth, flops / self.flops)
        self.results.append(
            Result(operation, rows, per_step, best, median, floor, nbytes / best / 1e9, flops / best / 1e9)
        )

    def linears(self) -> None:
        """Matrix products for 1, 8 and 512 rows."""
        for name, (rows, columns, bits, per_step) in LINEARS.items():
            packed = []
            for _ in range(per_step):
                codes = self.rng.integers(0, 2**bits, (rows, columns), np.uint8)
                scales, biases = (self.floats(rows, columns // 32).astype(np.float16) for _ in range(2))
                weight = AffineWeight(codes, scales.astype(np.float32), biases.astype(np.float32), bits)
                packed.append(self.backend.load_linear([weight], "auto"))
            for count in (1, 8, 512) if name != "head" else (1, 8):
                x = self.floats(count, columns)
                nbytes, flops = packed[0].nbytes, 2.0 * count * rows * columns
                self.add(
                    f"linear {name}", count, per_step, nbytes, flops,
                    lambda x=x, packed=packed: [self.backend.linear(x, weight) for weight in packed],
                    len(packed),
                )  # fmt: skip

    def attentions(self, kv_format: str) -> None:
        """Rope, append and attention, of decode steps and of prefill chunks."""
        layout = BlockLayout(parse_format(kv_format, HEAD_DIM), KV_HEADS, HEAD_DIM)
        arena = self.backend.new_arena(layout, LAYERS, 8 * 33)
        angles = self.rng.uniform(0, 6, (2112, HEAD_DIM // 2)).astype(np.float32)
        rope = RopeTable(np.cos(angles), np.sin(angles))
        fill = _batch([2112] * 8, 2112)
        values = self.floats(fill.rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        for layer in range(LAYERS):
            self.backend.rope_append(values, fill, arena, layer, SPEC, rope, None)
        token_bytes = layout.block_bytes / BLOCK_TOKENS
        for lengths, new in (
            ([513], 1),
            ([2049], 1),
            ([513] * 8, 1),
            ([2049] * 8, 1),
            ([512], 512),
            ([2048], 512),
        ):
            batch = _batch(lengths, new)
            qkv, q = values[: batch.rows], self.floats(batch.rows, HEADS * HEAD_DIM)
            keys = sum((2 * length - new + 1) / 2 * new for length in lengths)
            self.add(
                f"rope_append {kv_format}", batch.rows, LAYERS,
                qkv.nbytes + q.nbytes + batch.rows * token_bytes, 0,
                lambda qkv=qkv, batch=batch: [
                    self.backend.rope_append(qkv, batch, arena, layer, SPEC, rope, None)
                    for layer in range(LAYERS)
                ], LAYERS,
            )  # fmt: skip
            self.add(
                f"attention {kv_format} {len(lengths)}x{lengths[0]}", batch.rows, LAYERS,
                sum(lengths) * token_bytes, 4 * keys * HEADS * HEAD_DIM,
                lambda q=q, batch=batch: [
                    self.backend.attention(q, batch, arena, layer, SPEC) for layer in range(LAYERS)
                ], LAYERS,
            )  # fmt: skip

    def elementwise(self) -> None:
        """Norms, gates and embedding."""
        weight = self.floats(HIDDEN)
        table = self.backend.load_linear([self.floats(VOCABULARY, HIDDEN)], "int8")
        backend = self.backend
        for rows in (1, 8, 512):
            x, y, wide = self.floats(rows, HIDDEN), self.floats(rows, HIDDEN), self.floats(rows, 2 * FFN)
            ids = self.rng.integers(0, VOCABULARY, rows).astype(np.int32)
            self.add("rms_norm", rows, 1, 2 * x.nbytes, 0, lambda x=x: backend.rms_norm(x, weight, 1e-5), 1)
            self.add(
                "add_rms_norm", rows, 2 * LAYERS, 4 * x.nbytes, 0,
                lambda x=x, y=y: backend.add_rms_norm(x, y, weight, 1e-5), 1,
            )  # fmt: skip
            self.add(
                "gate silu",
                rows,
                LAYERS,
                1.5 * wide.nbytes,
                0,
                lambda wide=wide: backend.gate(wide, "silu"),
                1,
            )
            self.add("embed", rows, 1, 2 * x.nbytes, 0, lambda ids=ids: backend.embed(table, ids, 1.0), 1)


def main() -> None:
    """Run all, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="per operation")
    parser.add_argument("--formats", nargs="+", default=["int8"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bench = Bench(options.threads, options.seconds)
    print(f"bandwidth {bench.bandwidth / 1e9:.1f} GB/s, multiply-adds {bench.flops / 1e9:.0f} GFLOP/s")
    bench.linears()
    for kv_format in options.formats:
        bench.attentions(kv_format)
    bench.elementwise()
    print(
        f"{'operation':28} {'rows':>4} {'best us':>9} {'median':>9} "
        f"{'GB/s':>6} {'GFLOP/s':>7} {'of floor':>8} {'ms/step':>7}"
    )
    for r in bench.results:
        print(
            f"{r.operation:28} {r.rows:4} {r.best * 1e6:9.1f} {r.median * 1e6:9.1f} "
            f"{r.gigabytes_per_second:6.1f} {r.gigaflops:7.0f} {r.floor / r.best:8.0%} "
            f"{r.best * r.calls_per_step * 1e3:7.2f}"
        )
    if options.out:
        report = {
            "threads": options.threads,
            "bytes_per_second": bench.bandwidth,
            "flops_per_second": bench.flops,
            "results": [asdict(result) for result in bench.results],
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
