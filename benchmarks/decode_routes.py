"""Which decode attention kernel is the fastest, by format, head shape, batch and length: data for a table.

    python -m benchmarks.decode_routes [--quick] [--formats none,int8,int4]

Times are of one layer's attention under CUDA-graph replay; the layers of one arena take turns, so that none
of it lies in the second-level cache. Split-K is charged its share of the plan, made once for `LAYERS`
layers; a single pass has the most thread blocks a head with which all heads run at once. cuDNN is not among
them: it is forced, never routed to. A batch of equal lengths is the best case of a single pass, one of
lengths drawn from 1 to the longest is close to its worst; the table lets it run where it is not slower in
either by more than runs differ, at this length and all shorter ones. Prints that table as
`cuda/decode_route.py` has it, and writes results/h200/decode_routes.json.
"""

import argparse
import json
import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import RESULTS, cores, gpu_provenance, write
from kvrelay_kernels.cuda.clusters import Rooms
from kvrelay_kernels.cuda.decode_attention import DecodeAttention, DecodeProblem, launch_shape
from kvrelay_kernels.cuda.decode_route import DecodeRoute, Threshold, Thresholds, fitting_cluster
from kvrelay_kernels.cuda.decode_single_pass import (
    SinglePass,
    device_rooms,
    single_pass_key,
    single_pass_shape,
)
from kvrelay_kernels.cuda.module import KernelCache, KernelKey, device_arch
from kvrelay_kernels.interface import AttentionSpec
from kvrelay_kernels.plans import default_plan_folder, open_plans
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout, parse_format

SHAPES = ((32, 8, 128), (9, 3, 64), (16, 2, 256))
"""Query heads, KV heads, head dimension."""
BATCHES = (1, 2, 4, 8, 16, 32)
LENGTHS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
LAYERS = 32
BEYOND_CACHE = 2.4e9
"""Bytes that the layers in turn hold together, unless they would be too many."""
MOST_LAYERS = 256
MOST_BYTES = 16 << 30
REPEATS = 5
PACKAGES = ("numpy", "cupy-cuda13x")
SLACK, LEAST_SLACK = 0.02, 0.25
"""What a single pass may be slower by: a share of the time, or microseconds where that is less."""

Row = dict[str, Any]


def lengths_of(batch: int, longest: int, ragged: bool) -> Any:
    """`[batch]` int32."""
    lengths = np.full(batch, longest, np.int32)
    if ragged:
        lengths = np.random.default_rng(batch).integers(1, longest + 1, batch, dtype=np.int32)
        lengths[0] = longest
    return lengths


def make(fmt: str, heads: int, kv_heads: int, head_dim: int) -> DecodeProblem:
    """The problem of a format and a head shape."""
    layout = BlockLayout(parse_format(fmt, head_dim, "bfloat16"), kv_heads, head_dim)
    return DecodeProblem(layout, AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5), "bfloat16")


def keys_of(
    problem: DecodeProblem, rooms: Rooms, arch: str, batches: Sequence[int] = BATCHES
) -> Iterable[KernelKey]:
    """The kernels of a problem, for batches of so many sequences."""
    kv_heads = problem.spec.kv_heads
    for shape in {launch_shape(problem, sequences=batch) for batch in batches}:
        yield problem.key(shape, arch)
    for cluster in {fitting_cluster(batch * kv_heads, rooms) for batch in batches}:
        yield single_pass_key(problem, single_pass_shape(problem), cluster, arch)


def compile_into(folder: Path, keys: Sequence[KernelKey]) -> None:
    """Have kernels lie in the plan folder, compiled on all cores."""
    each = list(dict.fromkeys(keys))
    with ProcessPoolExecutor(cores(), multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(_compile, [folder] * len(each), each):
            pass


def _compile(folder: Path, key: KernelKey) -> None:
    KernelCache(open_plans(folder)).cubin(key)


class Contest:
    """The kernels of one problem on one arena."""

    def __init__(self, problem: DecodeProblem, kernels: KernelCache, rooms: Rooms) -> None:
        import cupy  # pyright: ignore[reportMissingImports]

        from benchmarks.decode_attention import random_blocks

        self.problem, self._kernels, self._rooms = problem, kernels, rooms
        layout = problem.layout
        some = random_blocks(layout, 256)
        self._arena = cupy.empty((MOST_BYTES // layout.block_bytes, layout.block_bytes), np.uint8)
        for at in range(0, len(self._arena), 256):
            place = self._arena[at : at + 256]
            place[...] = some[cupy.random.permutation(256)][: len(place)]

    def run(self, batch: int, longest: int, ragged: bool, stream: Any) -> list[Row]:
        """A row for each kernel that can run the case; none where it does not fit."""
        import cupy  # pyright: ignore[reportMissingImports]

        from benchmarks.decode_attention import bfloat16_bits, replay

        spec, block_bytes = self.problem.spec, self._arena.shape[1]
        needed = -(-longest // BLOCK_TOKENS)
        each = batch * needed
        layers = min(len(self._arena) // each, int(np.ceil(BEYOND_CACHE / (each * block_bytes))), MOST_LAYERS)
        if layers == 0:
            return []
        arena = self._arena[: layers * each].reshape(layers, each, block_bytes)
        order = np.random.default_rng(0).permutation(each).astype(np.int32)
        tables = cupy.asarray(order.reshape(batch, needed))
        lengths = cupy.asarray(lengths_of(batch, longest, ragged))
        shape = (layers, batch, spec.heads, spec.head_dim)
        q = bfloat16_bits(cupy.random.standard_normal(shape, np.float32))
        rows: list[Row] = []
        wanted: Any = None
        for route, cluster, kernel in self._contenders(batch):
            out = cupy.full(shape, 0xFFFF, np.uint16)
            kernel.attach(arena)

            def plan(kernel: Any = kernel) -> None:
                kernel.plan(lengths)

            calls: list[Callable[[], None]] = [
                lambda n=n, kernel=kernel, out=out: kernel(q[n], n, tables, out[n]) for n in range(layers)
            ]
            cupy.cuda.get_current_stream().synchronize()  # what was made on it is there for `stream`
            with stream:
                plan()
            spent = replay(calls, stream, REPEATS).median
            share = replay([plan] * 20, stream, REPEATS).median / LAYERS if route == "split-k" else 0.0
            found = (out.astype(np.uint32) << 16).view(np.float32)
            wanted = found if wanted is None else wanted
            rows.append({
                "format": self.problem.layout.format.name, "heads": spec.heads, "kv_heads": spec.kv_heads,
                "head_dim": spec.head_dim, "batch": batch, "longest": longest, "ragged": ragged,
                "route": route, "cluster": cluster, "microseconds": spent + share,
                "difference": float(cupy.linalg.norm(found - wanted) / cupy.linalg.norm(wanted)),
            })  # fmt: skip
        return rows

    def _contenders(self, batch: int) -> Iterable[tuple[DecodeRoute, int, Any]]:
        yield "split-k", 1, DecodeAttention(self.problem, batch, self._kernels)
        cluster = fitting_cluster(batch * self.problem.spec.kv_heads, self._rooms)
        yield "single-pass", cluster, SinglePass(self.problem, self._kernels, cluster)


def thresholds_of(rows: Sequence[Row]) -> Thresholds:
    """Where the single pass, in the clusters that fit, is as fast as split-K."""
    shapes: dict[tuple[str, int], dict[tuple[int, int, bool], dict[str, Row]]] = defaultdict(dict)
    for row in rows:
        shape = row["format"].partition("-")[0], row["head_dim"]
        case = row["batch"] * row["kv_heads"], row["longest"], row["ragged"]
        kept = shapes[shape].setdefault(case, {})
        # Of the single passes, the widest cluster is what `fitting_cluster` gives.
        if row["route"] not in kept or row["cluster"] > kept[row["route"]]["cluster"]:
            kept[row["route"]] = row
    table: dict[tuple[str, int], list[Threshold]] = {}
    for shape, cases in shapes.items():
        reached, found = max(longest for _, longest, _ in cases), list[Threshold]()
        for heads in sorted({heads for heads, _, _ in cases}):
            lengths = {longest for of, longest, _ in cases if of == heads}
            slower = [
                longest
                for (of, longest, _), kept in cases.items()
                if of == heads and _is_slower(kept["single-pass"], kept["split-k"])
            ]
            measured = [longest for longest in lengths if longest < min(slower, default=longest + 1)]
            # More heads never reach further than fewer do: the first threshold that fits is taken.
            reached = min(reached, max(measured, default=0))
            if reached:
                found.append(Threshold(heads, reached, "single-pass"))
        table[shape] = found
    return table


def _is_slower(row: Row, other: Row) -> bool:
    least = other["microseconds"]
    return row["microseconds"] - least > max(SLACK * least, LEAST_SLACK)


def print_case(rows: Sequence[Row]) -> None:
    """A line for a case."""
    if not rows:
        return
    first = rows[0]
    spent = " ".join(
        f"{row['route']}{'' if row['route'] != 'single-pass' else '/' + str(row['cluster'])}"
        f" {row['microseconds']:7.2f} ({row['difference']:.0e})"
        for row in rows
    )
    kind = "1.." if first["ragged"] else ""
    print(
        f"{first['format']:9} {first['heads']}/{first['kv_heads']}x{first['head_dim']}"
        f" {first['batch']:3} x {kind}{first['longest']:<6} {spent}",
        flush=True,
    )


def print_table(table: Thresholds) -> None:
    """The lines of `THRESHOLDS`."""
    for shape, thresholds in table.items():
        print(f"    {shape}: (" + "".join(f"\n        {row}," for row in thresholds) + "\n    ),")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="32/8 heads of 128 in int8 alone")
    parser.add_argument("--formats", default="int8,int4,none")
    parser.add_argument("--commit", help="name of the commit, where the checkout has no repository")
    parser.add_argument("--out", type=Path, default=RESULTS / "h200" / "decode_routes.json")
    options = parser.parse_args()
    import cupy  # pyright: ignore[reportMissingImports]

    folder = default_plan_folder()
    kernels = KernelCache(open_plans(folder))
    rooms, arch = device_rooms(kernels), device_arch()
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.get_default_memory_pool()
    formats = ["int8"] if options.quick else options.formats.split(",")
    problems = [make(fmt, *shape) for fmt in formats for shape in SHAPES[: 1 if options.quick else None]]
    compile_into(folder, [key for problem in problems for key in keys_of(problem, rooms, arch)])
    rows: list[Row] = []
    for problem in problems:
        contest = Contest(problem, kernels, rooms)
        for batch in BATCHES:
            for longest in LENGTHS:
                for ragged in (False, True)[: 1 + (batch > 1)]:
                    found = contest.run(batch, longest, ragged, stream)
                    print_case(found)
                    rows += found
        del contest
        pool.free_all_blocks()
    head = gpu_provenance(PACKAGES, options.commit) | {"rooms": rooms}
    write(head | {"rows": rows}, options.out)
    # As they are kept, to five digits: the committed table is compared with what they give.
    print_table(thresholds_of(json.loads(options.out.read_text())["rows"]))


if __name__ == "__main__":
    main()
