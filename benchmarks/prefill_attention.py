"""Prefill attention on the GPU: every route of ours, every mask, and the peers that are importable beside.

    python -m benchmarks.prefill_attention [--cases "causal 8192" ...] [--routes sparse ...] [--commit NAME]

Times are milliseconds of one layer's attention, plain calls and CUDA-graph replay. Several layers and sets of
queries take turns. Contenders of a case take turns too, in short samples, for the card's clock falls under
load. The error is against float64 on some rows of the output. Peers that know no masks are given a dense one.
Writes results/h200/prefill_attention.json; a choice of cases or routes goes where --out says, if anywhere.
"""

import argparse
import gc
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import cupy  # pyright: ignore[reportMissingImports]
import numpy as np
from numpy.typing import NDArray

from benchmarks.decode_attention import bfloat16_bits, decode_blocks, from_bfloat16, random_blocks
from benchmarks.machine import RESULTS, gpu_provenance, write
from benchmarks.peers.gpu_attention import Inputs, Peer, flash3_peer, torch_peer
from kvrelay_kernels.block_mask import TILE, BlockMask
from kvrelay_kernels.cuda.arena import CudaArena
from kvrelay_kernels.cuda.batch import Uploads, upload_batch
from kvrelay_kernels.cuda.device import find_gpu
from kvrelay_kernels.cuda.module import KernelCache, device_arch
from kvrelay_kernels.cuda.prefill_attention import PrefillAttention
from kvrelay_kernels.cuda.prefill_attention_route import HOPPER, Route
from kvrelay_kernels.interface import AttentionSpec, StepBatch
from kvrelay_kernels.plans import PlanStore
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout, parse_format

PATH = RESULTS / "h200" / "prefill_attention.json"
PACKAGES = (
    "numpy",
    "cupy-cuda13x",
    "torch",
    "jax",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-frontend",
    "dew-flash-attn-cu13",
)
SETS = 4
"""Layers, and sets of queries, that take turns: together beyond the second-level cache from 4096 rows on."""
SAMPLE_MS = 25.0
"""What a contender takes of a turn."""
GUESS = 6e11
"""Operations a millisecond that are expected, to size samples by."""
ROUNDS = 5
DENSE_MASKS = 8192
"""Keys up to which peers are given dense masks."""


@dataclass(frozen=True)
class Case:
    """One prompt's chunk, or several prompts, and what they see."""

    name: str
    prompts: tuple[tuple[int, int], ...]
    """`(queries, keys)`"""
    heads: tuple[int, int, int] = (32, 8, 128)
    fmt: str = "none"
    window: int | None = None
    mask: str | None = None
    """Of tiles: `random 0.25`, or `documents 16`."""

    def masks(self) -> list[BlockMask]:
        """What each prompt sees."""
        return [self._mask(queries, keys) for queries, keys in self.prompts]

    def _mask(self, queries: int, keys: int) -> BlockMask:
        rng = np.random.default_rng(keys)
        kind, _, value = (self.mask or "").partition(" ")
        if kind == "documents":
            starts = np.arange(0, keys, keys // int(value)) + 37
            return BlockMask.documents(queries, keys, np.array([0, *starts[1:]], np.int32))
        causal = BlockMask.causal(queries, keys, self.window)
        if kind != "random":
            return causal
        # As many of the tiles before the diagonal as asked for; the diagonal always.
        wanted = rng.random(causal.kinds.shape) < float(value)
        wanted |= np.eye(*causal.kinds.shape, dtype=np.bool_)
        return causal.restricted(wanted)


class Bench:
    """One case on random blocks."""

    def __init__(self, case: Case, kernels: KernelCache, stream: Any) -> None:
        self.case, self.kernels, self.stream = case, kernels, stream
        total, kv, dim = case.heads
        layout = BlockLayout(parse_format(case.fmt, dim, "bfloat16"), kv, dim)
        self.spec = AttentionSpec(total, kv, dim, dim**-0.5, case.window)
        self.found = case.masks()
        counts = np.array([queries for queries, _ in case.prompts], np.int32)
        lengths = np.array([keys for _, keys in case.prompts], np.int32)
        needed = -(-lengths // BLOCK_TOKENS)
        self.arena = CudaArena(layout, SETS, int(needed.sum()))
        order = np.random.default_rng(0).permutation(self.arena.blocks).astype(np.int32)
        tables = np.zeros((len(lengths), int(needed.max())), np.int32)
        for s, start in enumerate(np.cumsum(needed) - needed):
            tables[s, : needed[s]] = order[start : start + needed[s]]
        for layer in range(SETS):
            self.arena.bytes[layer] = random_blocks(layout, self.arena.blocks)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        positions = [np.arange(n - c, n) for c, n in zip(counts, lengths, strict=True)]
        self.host = StepBatch(
            np.zeros(int(starts[-1]), np.int32), np.concatenate(positions).astype(np.int32), starts, lengths,
            tables, starts[1:] - np.int32(1), np.ones(len(lengths), np.bool_),
        )  # fmt: skip
        self.uploads = Uploads()
        self.batch = upload_batch(self.host, self.uploads)
        shape = (int(starts[-1]), total, dim)
        self.q = [bfloat16_bits(cupy.random.standard_normal(shape, np.float32)) for _ in range(SETS)]
        self.out = cupy.empty(shape, np.uint16)

    @property
    def tiles(self) -> int:
        """Tiles that are computed, for each head."""
        return sum(mask.computed for mask in self.found)

    def values(self, layer: int, side: str) -> Any:
        """`[keys, kv_heads, head_dim]` float64 of the first prompt."""
        blocks = self.arena.bytes[layer][cupy.asarray(self.host.block_tables[0])]
        keys = self.case.prompts[0][1]
        return decode_blocks(self.arena.layout, blocks, side)[:, :keys].transpose(1, 0, 2)

    def contender(self, route: Route, calls: int) -> Peer:
        """One of our own routes, from the arena to the output. Raises FormatUnsupported."""
        device = find_gpu().device_class
        attention = PrefillAttention("bfloat16", self.kernels, self.uploads, PlanStore(), device, route=route)
        masks = dict(enumerate(self.found)) if self.case.mask else None

        def run(n: int) -> None:
            layer = n % SETS
            attention.prefill(self.q[layer], self.batch, self.arena, layer, self.spec, self.out, masks)

        def output() -> Any:
            self.out.fill(0xFFFF)
            run(0)
            return self.out[: self.case.prompts[0][0]]

        run(0)
        self.stream.synchronize()
        self.stream.begin_capture()
        for n in range(calls):
            run(n)
        graph = self.stream.end_capture()
        return Peer(
            f"kvrelay {route}",
            lambda: [self._timed(lambda n=n: run(n), 1) for n in range(calls)],
            lambda: [self._timed(lambda: graph.launch(self.stream), calls)],
            output,
        )

    def _timed(self, call: Callable[[], None], each: int) -> float:
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(self.stream)
        call()
        stop.record(self.stream)
        stop.synchronize()
        return cupy.cuda.get_elapsed_time(start, stop) / each

    def peers(self, calls: int, chained: int) -> list[Peer]:
        """Who else can do it; `chained` calls where only many at once can be timed."""
        case = self.case
        if len(case.prompts) != 1 or case.fmt != "none" or case.heads != (32, 8, 128):
            return []
        k, v = (
            [bfloat16_bits(self.values(n, side).astype(np.float32)) for n in range(SETS)] for side in "kv"
        )
        self.stream.synchronize()  # peers have streams of their own
        inputs = Inputs(self.q, k, v, self.spec.scale)
        queries, keys = case.prompts[0]
        found: list[Peer] = []
        plain = case.mask is None and case.window is None
        tries: list[Callable[[], Peer | None]] = []
        if plain and queries == keys:
            tries += [
                lambda: torch_peer("cudnn", inputs, None, calls),
                lambda: torch_peer("flash", inputs, None, calls),
            ]
        elif keys <= DENSE_MASKS:
            seen = cupy.asarray(self.found[0].dense())
            tries += [lambda: torch_peer("cudnn", inputs, seen, calls)]
        if case.mask is None:
            tries += [lambda: flash3_peer(inputs, case.window, chained)]
        for attempt in tries:
            try:
                peer = attempt()
            except RuntimeError as error:
                print(f"{case.name}: {str(error).splitlines()[0]}")
                continue
            found += [peer] if peer else []
        return found

    def exact(self, rows: NDArray[np.intp]) -> Any:
        """float64 output of some rows of the first prompt on layer 0, `[rows, heads, head_dim]`."""
        mask, spec = self.found[0], self.spec
        k, v = self.values(0, "k"), self.values(0, "v")
        positions, key = (mask.keys - mask.queries + rows)[:, None], np.arange(mask.keys)
        seen = (key <= positions) & ((key >= mask.low[rows][:, None]) | (key < mask.prefix))
        seen &= np.repeat(mask.kinds[rows // TILE] != 0, TILE, 1)[:, : mask.keys]
        queries = from_bfloat16(self.q[0][cupy.asarray(rows)]).astype(np.float64)
        out = cupy.empty(queries.shape, np.float64)
        for head in range(spec.heads):
            group = head * spec.kv_heads // spec.heads
            scores = queries[:, head] @ k[:, group].T * spec.scale
            scores = cupy.where(cupy.asarray(seen), scores, -np.inf)
            p = cupy.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = p @ v[:, group] / p.sum(-1, keepdims=True)
        return out

    def run(self, routes: list[Route]) -> dict[str, Any]:
        """Time all contenders in turns, and check them."""
        work = 4 * self.spec.heads * self.spec.head_dim * TILE * TILE * self.tiles
        fitting = SAMPLE_MS / (work / GUESS)
        calls, chained = int(np.clip(fitting, 2, 40)), int(np.clip(2 * fitting, 2, 400))
        contenders = [self.contender(route, calls) for route in routes] + self.peers(calls, chained)
        plain: dict[str, list[float]] = {one.name: [] for one in contenders}
        replay: dict[str, list[float]] = {one.name: [] for one in contenders}
        turns = list(contenders)
        for _ in range(ROUNDS):
            random.shuffle(turns)
            for one in turns:
                plain[one.name] += one.sample()
                replay[one.name] += one.replay() if one.replay else []
        rows = np.unique(np.linspace(0, self.case.prompts[0][0] - 1, 24).astype(np.intp))
        want = self.exact(rows)
        results = []
        for one in contenders:
            got = from_bfloat16(cupy.ascontiguousarray(one.output()[cupy.asarray(rows)])).astype(np.float64)
            best = float(np.median(replay[one.name] or plain[one.name]))
            results.append({
                "name": one.name,
                "plain_ms": spread(plain[one.name]),
                "replay_ms": spread(replay[one.name]),
                "tile_flops_per_second": work / best * 1e3,
                "relative_error": float(cupy.linalg.norm(got - want) / cupy.linalg.norm(want)),
            })  # fmt: skip
        density = self.tiles / sum(BlockMask.causal(*shape).computed for shape in self.case.prompts)
        return {"case": asdict(self.case), "tiles": self.tiles, "density": density, "contenders": results}


def spread(times: list[float]) -> dict[str, float] | None:
    """Median, mean, least and most; None where nothing was timed."""
    if not times:
        return None
    return {
        "median": float(np.median(times)),
        "mean": float(np.mean(times)),
        "least": min(times),
        "most": max(times),
    }


def all_cases() -> list[Case]:
    """What prefill must be fast at, then other shapes of heads and other formats."""
    cases = [Case(f"causal {n}", ((n, n),)) for n in (2048, 8192, 32768)]
    cases += [Case(f"2048 on {n}", ((2048, n),)) for n in (8192, 32768)]
    cases += [Case(f"window 1024 at {n}", ((n, n),), window=1024) for n in (8192, 32768)]
    for n in (8192, 32768):
        cases += [Case(f"random {d:.0%} at {n}", ((n, n),), mask=f"random {d}") for d in (0.1, 0.25, 0.5)]
    cases += [Case("16 documents at 8192", ((8192, 8192),), mask="documents 16")]
    mixed = tuple((n, n) for n in (256, 512, 777, 1024, 1500, 2048, 3000, 4096))
    cases += [Case("8 prompts of 256 to 4096", mixed)]
    for heads in ((32, 8, 64), (32, 8, 96), (16, 8, 256), (32, 32, 128), (32, 4, 128)):
        shape = "{}/{} heads of {}".format(*heads)
        cases += [Case(f"causal {n}, {shape}", ((n, n),), heads) for n in (2048, 8192)]
    for fmt in ("int8-g64", "int4-g64"):
        cases += [Case(f"{fmt}, 2048 on {n}", ((2048, n),), fmt=fmt) for n in (8192, 32768)]
    return cases


def main() -> None:
    """Measure, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--routes", nargs="+", choices=get_args(Route), help="these of ours alone")
    parser.add_argument("--commit", help="name of the commit, where the checkout has no repository")
    parser.add_argument("--out", type=Path, help="in place of results/h200")
    options = parser.parse_args()
    cases = all_cases()
    if options.cases:
        if unknown := set(options.cases) - {case.name for case in cases}:
            parser.error(f"no such case: {', '.join(sorted(unknown))}")
        cases = [case for case in cases if case.name in options.cases]
    out = options.out or (None if options.cases or options.routes else PATH)

    stream = cupy.cuda.Stream(non_blocking=True)
    stream.use()
    kernels = KernelCache()
    head = gpu_provenance(PACKAGES, options.commit)
    rows: list[dict[str, Any]] = []
    print(f"{'case':36} {'contender':24}   replay    plain    least     most TFLOP/s error")
    own: list[Route] = ["sparse", "sparse_mma"] if device_arch() == HOPPER else ["sparse_mma"]
    for case in cases:
        routes: list[Route] = own if case.mask else [*own, "cudnn"]
        chosen: list[Route] = [route for route in routes if route in (options.routes or routes)]
        row = Bench(case, kernels, stream).run(chosen)
        rows.append(row)
        for one in row["contenders"]:
            plain, replay = one["plain_ms"], one["replay_ms"] or {"median": float("nan")}
            times = (
                f"{replay['median']:8.4f} {plain['median']:8.4f} {plain['least']:8.4f} {plain['most']:8.4f}"
            )
            speed = f"{one['tile_flops_per_second'] / 1e12:6.0f}  {one['relative_error']:.1e}"
            print(f"{case.name:36} {one['name']:24} {times} {speed}", flush=True)
        gc.collect()
        cupy.get_default_memory_pool().free_all_blocks()
        if out:
            write({**head, "sets": SETS, "rounds": ROUNDS, "rows": rows}, out)


if __name__ == "__main__":
    main()
