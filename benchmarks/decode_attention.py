"""Decode attention on the GPU by format, batch and length: time, accuracy, bandwidth, torch's cuDNN beside.

    python -m benchmarks.decode_attention [--quick] [--formats LIST] [--commit NAME]

Times are of one layer's attention under CUDA-graph replay, of split-K and, where the heads of a batch run at
once, of the single pass (`decode_route.py` chooses between them); the plan of a step, made once for all
layers, is timed apart. The layers of one arena take turns (same tables and lengths, other bytes, together
beyond the second-level cache); blocks lie in random order. GB/s count the bytes that must be read: codes,
scales and biases of the tokens there are. Errors are against float64 attention over what the codes stand for
(in turbo formats rotated values, and so a rotated result). Writes results/h200/decode_attention.json.
"""

import argparse
import json
import platform
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cupy  # pyright: ignore[reportMissingImports]
import numpy as np

from benchmarks.decode_routes import compile_into, keys_of, make
from kvrelay_kernels.cuda.decode_attention import DecodeAttention, DecodeProblem
from kvrelay_kernels.cuda.decode_route import fitting_cluster
from kvrelay_kernels.cuda.decode_single_pass import SinglePass, device_rooms
from kvrelay_kernels.cuda.module import KernelCache, device_arch
from kvrelay_kernels.plans import default_plan_folder, open_plans
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout, levels, scales
from kvrelay_kernels.quant.codec import quantize

RESULTS = Path(__file__).parent / "results" / "h200" / "decode_attention.json"
BEYOND_CACHE = 400e6
"""Bytes that arrays in turn hold together, at least; the second-level cache has 60 MB."""
FAR_BEYOND_CACHE = 2.4e9
"""The same where the cache may keep some of them from turn to turn: what is read once is marked so here."""
MOST_LAYERS = 600
LIMIT = 12 << 30
MOSTLY_IDLE = 60
"""Thread blocks that are too few to be worth a try."""
CODED = 64
"""Quantized blocks that are made: by the host, as the definition says."""
FORMATS = ["none", "int8-g64", "int8-g32", "int6-g64", "int4-g64", "int4-g32"]
FORMATS += ["mxfp8", "mxfp4", "nvfp4", "turbo4", "turbo3"]

READ_SOURCE = r"""
extern "C" __global__ void __launch_bounds__(1024) read_all(const uint4* from, long long n, unsigned* out) {
    unsigned x = 0;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += 8 * step) {
        uint4 v[8];
        #pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] = i + j * step < n ? __ldg(from + i + j * step) : make_uint4(0, 0, 0, 0);
        #pragma unroll
        for (int j = 0; j < 8; j++) x ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (x == 0x9e3779b9u) *out = x;
}
"""


@dataclass(frozen=True)
class Case:
    """A batch: `[sequences]` lengths under a name."""

    name: str
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Times:
    """Microseconds of one call: median, least and most of several replays."""

    median: float
    least: float
    most: float


def equal(batch: int, length: int) -> Case:
    return Case(f"{batch} x {length}", (length,) * batch)


def ragged(batch: int, longest: int) -> list[Case]:
    """A batch of random lengths, and one with the same tokens at equal lengths."""
    lengths = np.random.default_rng(1).integers(1, longest + 1, batch)
    return [Case(f"{batch} x 1..{longest}", tuple(lengths.tolist())), equal(batch, int(lengths.mean()))]


def replay(calls: list[Callable[[], None]], stream: Any, repeats: int = 11) -> Times:
    """Time the calls, captured one behind the other in a graph."""
    with stream:
        calls[0]()
        stream.synchronize()
        stream.begin_capture()
        loops = max(1, 20 // len(calls))
        for _ in range(loops):
            for call in calls:
                call()
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
        times = []
        for _ in range(repeats):
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            stop.record(stream)
            stop.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, stop) * 1e3 / (loops * len(calls)))
    return Times(float(np.median(times)), min(times), max(times))


def read_bandwidth(stream: Any) -> float:
    """Bytes a second of a kernel that only reads 2.3 GB, the best of three grids."""
    kernel = cupy.RawKernel(READ_SOURCE, "read_all")
    nbytes = 2281701376
    source, out = cupy.random.randint(0, 256, 2 * nbytes, dtype=np.uint8), cupy.zeros(1, np.uint32)
    best = 0.0
    for grid, threads in ((132, 1024), (264, 1024), (528, 512)):
        calls = [
            lambda half=half, grid=grid, threads=threads: kernel(
                (grid,), (threads,), (source[half * nbytes :], np.int64(nbytes // 16), out)
            )
            for half in (0, 1)
        ]
        best = max(best, nbytes / replay(calls, stream).median * 1e6)
    return best


def bfloat16_bits(values: Any) -> Any:
    """float32 -> bfloat16 as uint16, rounded to nearest."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def random_blocks(layout: BlockLayout, count: int) -> Any:
    """`[count, block_bytes]` blocks of standard normal keys and values; of quantized ones `CODED` differ."""
    fmt, rng = layout.format, cupy.random
    made = min(count, CODED) if fmt.quantized else count
    blocks = cupy.zeros((made, layout.block_bytes), np.uint8)
    for side in "kv":
        values = rng.standard_normal((made, layout.kv_heads, BLOCK_TOKENS, layout.head_dim), np.float32)
        if fmt.quantized:
            parts = {name: cupy.asarray(array) for name, array in quantize(values.get(), fmt).items()}
        else:
            parts = {"values": bfloat16_bits(values)}
        for name, array in parts.items():
            frame = layout.frame(f"{side}_{name}")
            octets = cupy.ascontiguousarray(array).view(np.uint8).reshape(made, -1)
            blocks[:, frame.offset : frame.offset + frame.nbytes] = octets
    return blocks[cupy.arange(count) % made]


def unpack(octets: Any, bits: int) -> Any:
    """Codes of a little-endian stream of bits along the last dimension, as `quant.packing` packs them."""
    first = cupy.arange(octets.shape[-1] * 8 // bits) * bits
    wide = cupy.concatenate([octets, cupy.zeros_like(octets[..., :1])], -1).astype(np.uint16)
    pairs = wide[..., first // 8] | wide[..., first // 8 + 1] << 8
    return pairs >> (first % 8).astype(np.uint16) & (2**bits - 1)


def decode_blocks(layout: BlockLayout, blocks: Any, side: str) -> Any:
    """float64 values `[kv_heads, tokens, head_dim]` of blocks in order."""

    def part(name: str, dtype: Any) -> Any:
        frame = layout.frame(f"{side}_{name}")
        octets = cupy.ascontiguousarray(blocks[:, frame.offset : frame.offset + frame.nbytes])
        return octets.view(dtype).reshape(len(blocks), layout.kv_heads, BLOCK_TOKENS, -1)

    fmt = layout.format
    if not fmt.quantized:
        values = from_bfloat16(part("values", np.uint16)).astype(np.float64)
    else:
        table, kind = fmt.scheme.levels, fmt.scheme.scales
        codes = unpack(part("codes", np.uint8), fmt.code_bits)
        if table is None:
            numbers = codes.astype(np.float64)
        else:
            numbers = cupy.asarray(levels.decode(np.arange(2**fmt.code_bits, dtype=np.uint8), table))[codes]
        if kind == "float16":
            sizes = part("scales", np.float16)
        else:
            sizes = cupy.asarray(scales.decode(np.arange(256, dtype=np.uint8), kind))[
                part("scales", np.uint8)
            ]
        groups = numbers.reshape(*sizes.shape, fmt.group) * sizes.astype(np.float64)[..., None]
        if fmt.affine:
            groups += part("biases", np.float16).astype(np.float64)[..., None]
        values = groups.reshape(codes.shape)
    return values.transpose(1, 0, 2, 3).reshape(layout.kv_heads, -1, layout.head_dim)


def exact(problem: DecodeProblem, q: Any, blocks: Any, length: int) -> Any:
    """float64 attention of one sequence's query row, `[heads, head_dim]`."""
    layout, spec = problem.layout, problem.spec
    k, v = (decode_blocks(layout, blocks, side)[:, :length] for side in "kv")
    queries = from_bfloat16(q).astype(np.float64).reshape(spec.kv_heads, -1, spec.head_dim)
    scores = cupy.matmul(queries, k.transpose(0, 2, 1)) * spec.scale
    p = cupy.exp(scores - scores.max(-1, keepdims=True))
    return (cupy.matmul(p, v) / p.sum(-1, keepdims=True)).reshape(spec.heads, spec.head_dim)


class Bench:
    """Runs cases of one problem on one arena."""

    def __init__(
        self, fmt: str, heads: tuple[int, int], head_dim: int, kernels: KernelCache, stream: Any
    ) -> None:
        total, kv = heads
        self.problem = make(fmt, total, kv, head_dim)
        layout = self.problem.layout
        self.kernels, self.stream, self.rooms = kernels, stream, device_rooms(kernels)
        self.token_bytes = sum(frame.nbytes for frame in layout.frames) / BLOCK_TOKENS
        count = LIMIT // layout.block_bytes
        self.arena = cupy.empty((count, layout.block_bytes), np.uint8)
        pool = random_blocks(layout, 256)
        for at in range(0, count, 256):
            self.arena[at : at + 256] = pool[cupy.random.permutation(256)][: count - at]

    def run(self, case: Case) -> list[dict[str, Any]]:
        """Time and check one case: a row for each kernel."""
        problem, lengths = self.problem, np.array(case.lengths, np.int32)
        needed = -(-lengths // BLOCK_TOKENS)
        each, nbytes = int(needed.sum()), float(lengths.sum()) * self.token_bytes
        layers = int(max(1, min(len(self.arena) // each, np.ceil(FAR_BEYOND_CACHE / nbytes), MOST_LAYERS)))
        arena = self.arena[: layers * each].reshape(layers, each, -1)
        order = np.random.default_rng(0).permutation(each).astype(np.int32)
        host_tables = np.zeros((len(lengths), int(needed.max())), np.int32)
        for s, start in enumerate(np.cumsum(needed) - needed):
            host_tables[s, : needed[s]] = order[start : start + needed[s]]
        tables, lengths_here = cupy.asarray(host_tables), cupy.asarray(lengths)
        shape = (layers, len(lengths), problem.spec.heads, problem.spec.head_dim)
        q = bfloat16_bits(cupy.random.standard_normal(shape, np.float32))
        want = {
            (n, s): exact(problem, q[n, s], arena[n][tables[s, : needed[s]]], int(lengths[s]))
            for n in {0, layers - 1}
            for s in {0, len(lengths) - 1}
        }
        rows: list[dict[str, Any]] = []
        for route, attention in self._contenders(case):
            out = cupy.full(shape, 0xFFFF, np.uint16)
            attention.attach(arena)
            cupy.cuda.get_current_stream().synchronize()
            with self.stream:
                attention.plan(lengths_here)
            calls = [lambda n=n, a=attention, out=out: a(q[n], n, tables, out[n]) for n in range(layers)]
            times = replay(calls, self.stream)
            worst = 0.0
            for (n, s), exactly in want.items():
                got = from_bfloat16(out[n, s]).astype(np.float64)
                worst = max(worst, float(cupy.linalg.norm(got - exactly) / cupy.linalg.norm(exactly)))
            row = {
                "format": problem.layout.format.name,
                "heads": f"{problem.spec.heads}/{problem.spec.kv_heads} x {problem.spec.head_dim}",
                "case": case.name,
                "route": route,
                "microseconds": asdict(times),
                "bytes": nbytes,
                "bytes_per_second": nbytes / times.median * 1e6,
                "relative_error": worst,
                "launch": asdict(attention.shape),
            }
            if isinstance(attention, DecodeAttention):
                plan = replay([lambda a=attention: a.plan(lengths_here)] * 20, self.stream)
                row["plan_microseconds"] = plan.median
            rows.append(row)
        return rows

    def _contenders(self, case: Case) -> Iterable[tuple[str, DecodeAttention | SinglePass]]:
        """Split-K; and a single pass of a batch of equal lengths that does not leave most of the GPU idle."""
        yield "split-k", DecodeAttention(self.problem, len(case.lengths), self.kernels)
        heads = len(case.lengths) * self.problem.spec.kv_heads
        cluster = fitting_cluster(heads, self.rooms)
        if len(set(case.lengths)) == 1 and cluster * heads >= MOSTLY_IDLE:
            yield f"single-pass/{cluster}", SinglePass(self.problem, self.kernels, cluster)


def torch_cudnn(case: Case, heads: tuple[int, int], head_dim: int) -> Times | None:
    """torch's cuDNN attention in bfloat16 on contiguous keys and values; None if it cannot."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]

    batch, length, (total, kv) = len(case.lengths), case.lengths[0], heads
    nbytes = batch * length * kv * head_dim * 4
    layers = int(max(1, min(np.ceil(FAR_BEYOND_CACHE / nbytes), MOST_LAYERS)))
    options = {"device": "cuda", "dtype": torch.bfloat16}
    try:
        k = torch.randn(layers, batch, kv, length, head_dim, **options)
        v = torch.randn(layers, batch, kv, length, head_dim, **options)
        q = torch.randn(layers, batch, total, 1, head_dim, **options)

        def step() -> None:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                for n in range(layers):
                    torch.nn.functional.scaled_dot_product_attention(q[n], k[n], v[n], enable_gqa=True)

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        loops = max(1, 20 // layers)
        with torch.cuda.graph(graph):
            for _ in range(loops):
                step()
        times = []
        for _ in range(12):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) * 1e3 / (loops * layers))
    except RuntimeError as error:
        print(f"torch cuDNN, {case.name}: {str(error).splitlines()[0]}")
        return None
    finally:
        torch.cuda.empty_cache()
    return Times(float(np.median(times[1:])), min(times[1:]), max(times[1:]))


def commit_name() -> str:
    """The checkout's commit; `unknown` outside a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three cases, no file")
    parser.add_argument("--formats", help="a list such as int8-g64,nvfp4 instead of all; no file")
    parser.add_argument("--commit", help="name of the commit, where the checkout has no repository")
    options = parser.parse_args()

    cases = [equal(*pair) for pair in ((1, 2048), (1, 8192), (1, 32768), (8, 2048), (8, 8192), (8, 32768))]
    cases += [equal(32, 8192), equal(32, 32768), *ragged(32, 32768), equal(1, 131072)]
    formats, others = FORMATS, ["none", "int8", "int4", "mxfp8", "nvfp4", "turbo4"]
    shapes = [((16, 2), 256), ((32, 16), 256), ((9, 3), 64), ((12, 4), 96)]
    if options.quick:
        cases, shapes = [equal(1, 2048), equal(1, 32768), equal(8, 32768)], []
    if options.formats:
        formats = others = options.formats.split(",")

    stream = cupy.cuda.Stream(non_blocking=True)
    kernels = KernelCache(open_plans(default_plan_folder()))
    peak = read_bandwidth(stream)
    print(f"read bandwidth {peak / 1e12:.3f} TB/s")
    peers: dict[str, Times | None] = {}
    for case in cases:
        if len(set(case.lengths)) == 1:
            peers[case.name] = torch_cudnn(case, (32, 8), 128)
    cupy.get_default_memory_pool().free_all_blocks()

    rows: list[dict[str, Any]] = []
    print(
        "format    heads      case           route               us    least     most   GB/s of read    error"
        "  cuDNN  times"
    )
    work = [(fmt, (32, 8), 128, cases) for fmt in formats]
    work += [(fmt, heads, dim, [equal(8, 32768)]) for heads, dim in shapes for fmt in others]
    problems = [make(fmt, *heads, dim) for fmt, heads, dim, _ in work]
    rooms, arch = device_rooms(kernels), device_arch()
    batches = sorted({len(case.lengths) for case in cases})
    keys = [key for each in problems for key in keys_of(each, rooms, arch, batches)]
    compile_into(default_plan_folder(), keys)
    for fmt, heads, dim, which in work:
        bench = Bench(fmt, heads, dim, kernels, stream)
        for case, row in ((each, row) for each in which for row in bench.run(each)):
            peer = peers.get(case.name) if dim == 128 else None
            row["fraction_of_read"] = row["bytes_per_second"] / peak
            row["torch_cudnn_bf16"] = asdict(peer) if peer else None
            rows.append(row)
            times = row["microseconds"]
            median, least, most = (f"{times[name]:8.1f}" for name in ("median", "least", "most"))
            speed = f"{row['bytes_per_second'] / 1e9:6.0f} {row['fraction_of_read']:7.1%}"
            beside = f"{peer.median:6.1f} {peer.median / times['median']:6.2f}" if peer else ""
            name = f"{row['format']:9} {row['heads']:10} {case.name:14} {row['route']:14}"
            print(f"{name} {median} {least} {most} {speed} {row['relative_error']:8.1e} {beside}", flush=True)
        del bench
        cupy.get_default_memory_pool().free_all_blocks()

    if options.quick or options.formats:
        return
    import torch  # pyright: ignore[reportMissingImports]

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    machine = {
        "device": properties["name"].decode(),
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "cuda_runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "cupy": cupy.__version__,
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "commit": options.commit or commit_name(),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(
        json.dumps({"machine": machine, "read_bytes_per_second": peak, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
