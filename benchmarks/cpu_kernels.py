"""How near do the CPU backend's operations come to what the machine allows? Shapes of SmolLM2-135M.

The floor of an operation is the longer of: its bytes at the bandwidth, its multiply-adds at the rate that
this script measures first (of integers, where weights are codes). Weights are rotated over as many copies as
the model has layers, so that they come from memory and not from a cache. Best of many repeats, since other
processes only ever add time.

Then steps of decode of the model itself, recorded as in serving: as a whole, and all operations of a kind
behind each other (whose weights may then fit in a cache that the whole step does not fit in).

    python benchmarks/cpu_kernels.py --out benchmarks/results/cpu_kernels.json
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np

from kvrelay_kernels.cpu.backend import CpuBackend
from kvrelay_kernels.cpu.coded import TILE_ROWS as CODED_ROWS
from kvrelay_kernels.cpu.coded import new_records
from kvrelay_kernels.cpu.integers import COLUMNS, code_product
from kvrelay_kernels.cpu.products import TILE_LANES, TILE_ROWS, multiply
from kvrelay_kernels.cpu.program import Operation, Program
from kvrelay_kernels.cpu.recording import Recorder, Recording
from kvrelay_kernels.cpu.tiles import PANEL
from kvrelay_kernels.interface import AttentionSpec, Logits, RopeTable, StepBatch
from kvrelay_kernels.quant import BLOCK_TOKENS, AffineWeight, BlockLayout, parse_format
from model_runtime.opening import open_decoder
from model_runtime.options import DecoderOptions
from model_runtime.progress import silent
from model_runtime.sampler import SamplingConfig, sample
from model_runtime.steps import sequence_steps

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 30, 576, 1536, 9, 3, 64, 49152
SPEC = AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5)
DEPTH = 256
"""Columns of the tile of integers whose rate is measured."""
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


@dataclass(frozen=True)
class StepPart:
    """A recorded step of decode, or its operations of one kind: seconds of all of them."""

    operation: str
    rows: int
    operations: int
    best: float
    median: float


class Named:
    """A backend that remembers whose the operations are that its recorder takes down."""

    def __init__(self, backend: CpuBackend, names: list[str]) -> None:
        self._backend, self._names = backend, names

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._backend, name)
        recorder = self._backend._sink  # pyright: ignore[reportPrivateUsage]
        assert isinstance(recorder, Recorder)

        def call(*args: Any) -> Any:
            result = method(*args)
            multiplies = name in ("linear", "gated_linear", "logits")
            shape = f" {args[1].columns} -> {args[1].rows}" if multiplies else ""
            self._names.extend([name + shape] * (len(recorder.operations) - len(self._names)))
            return result

        return call


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


@numba.njit(parallel=True)
def _integer_multiply_adds(
    x: np.ndarray, codes: np.ndarray, affine: np.ndarray, out: np.ndarray, times: int, threads: int
) -> None:
    for thread in numba.prange(threads):
        for _ in range(times):
            code_product(
                x[thread],
                0,
                CODED_ROWS,
                codes[thread],
                0,
                0,
                affine[thread],
                0,
                COLUMNS,
                0,
                DEPTH // COLUMNS,
                out[thread],
                0,
                PANEL,
                16,
                COLUMNS,
                CODED_ROWS,
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


def _ceilings(threads: int) -> tuple[float, float, float]:
    """Bytes a second of a long sum, and operations a second of the innermost tiles: float32, and integers."""
    data = np.ones(1 << 26, np.float32)
    bandwidth = data.nbytes / _times(lambda: _sum(data), 1.0)[0]
    x, w = (np.ones((threads, n), np.float32) for n in (TILE_ROWS * 128, 128 * TILE_LANES))
    out = np.empty((threads, TILE_ROWS * TILE_LANES), np.float32)
    seconds = _times(lambda: _multiply_adds(x, w, out, 2000, threads), 1.0)[0]
    flops = 2.0 * 2000 * threads * TILE_ROWS * TILE_LANES * 128 / seconds
    records = np.stack([new_records(CODED_ROWS, DEPTH) for _ in range(threads)])
    records[:] = 0
    codes = np.ones((threads, DEPTH * PANEL), np.uint16)
    affine = np.ones((threads, DEPTH // COLUMNS * 2 * PANEL), np.float32)
    sums = np.empty((threads, CODED_ROWS * PANEL), np.float32)
    seconds = _times(lambda: _integer_multiply_adds(records, codes, affine, sums, 2000, threads), 1.0)[0]
    return bandwidth, flops, 2.0 * 2000 * threads * CODED_ROWS * PANEL * DEPTH / seconds


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
        self.bandwidth, self.flops, self.integers = _ceilings(threads)
        self.results: list[Result] = []
        self.steps: list[StepPart] = []

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
        integers: bool = False,
    ) -> None:
        """Time `calls` calls made by `call`, each of so many bytes and operations."""
        best, median = _times(call, self.seconds, calls)
        floor = max(nbytes / self.bandwidth, flops / (self.integers if integers else self.flops))
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
                    len(packed), integers=True,
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

    def draws(self) -> None:
        """The sampler's, of one row."""
        logits = 3 * self.floats(VOCABULARY)
        configs = {
            "greedy": SamplingConfig(temperature=0),
            "top-p": SamplingConfig(temperature=0.8, top_p=0.95),
        }
        for name, config in configs.items():
            self.add(
                f"draw {name}", 1, 1, logits.nbytes, 0,
                lambda config=config: sample(logits, config, 0, [], []), 1,
            )  # fmt: skip

    def recorded(self, model: str, kv_format: str, past: int) -> None:
        """Steps of decode of a real model behind `past` tokens, 1 row and 8."""
        decoder = open_decoder(DecoderOptions(model, threads=self.backend.threads), silent)
        backend = decoder.backend
        assert isinstance(backend, CpuBackend)
        for rows in (1, 8):
            arena = decoder.new_arena(rows * (past // BLOCK_TOKENS + 2), kv_format)
            names: list[str] = []
            step = decoder.step(arena)

            def named(backend: Any, batch: StepBatch, step: Any = step, names: Any = names) -> Logits:
                return step(Named(backend, names), batch)

            recording = backend.record(named, rows, arena)
            assert isinstance(recording, Recording)
            batch = sequence_steps([1] * rows, [past] * rows)[0]
            whole = _times(lambda recording=recording, batch=batch: recording(batch), self.seconds)
            self.steps.append(StepPart(f"step after {past}", rows, len(names), *whole))
            kinds: dict[str, list[Operation]] = {}
            for name, operation in zip(names, recording.operations, strict=True):
                kinds.setdefault(name, []).append(operation)
            for name, operations in kinds.items():
                program = Program(operations, backend.threads)
                self.steps.append(StepPart(name, rows, len(operations), *_times(program.run, self.seconds)))


def main() -> None:
    """Run all, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="per operation")
    parser.add_argument("--formats", nargs="+", default=["int8"])
    parser.add_argument("--model", default="smollm2", help="whose recorded steps are timed")
    parser.add_argument("--past", type=int, default=512, help="tokens behind which they are")
    parser.add_argument("--only-steps", action="store_true", help="leave out all other operations")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bench = Bench(options.threads, options.seconds)
    print(
        f"bandwidth {bench.bandwidth / 1e9:.1f} GB/s, multiply-adds {bench.flops / 1e9:.0f} GFLOP/s, "
        f"of integers {bench.integers / 1e9:.0f}"
    )
    if not options.only_steps:
        bench.linears()
        for kv_format in options.formats:
            bench.attentions(kv_format)
        bench.elementwise()
        bench.draws()
    for kv_format in options.formats:
        bench.recorded(options.model, kv_format, options.past)
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
    print(f"{'in a recorded step':28} {'rows':>4} {'number':>6} {'best ms':>8} {'median':>8}")
    for part in bench.steps:
        times = f"{part.best * 1e3:8.3f} {part.median * 1e3:8.3f}"
        print(f"{part.operation:28} {part.rows:4} {part.operations:6} {times}")
    if options.out:
        report = {
            "threads": options.threads,
            "bytes_per_second": bench.bandwidth,
            "flops_per_second": bench.flops,
            "integer_operations_per_second": bench.integers,
            "results": [asdict(result) for result in bench.results],
            "steps": [asdict(part) for part in bench.steps],
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
