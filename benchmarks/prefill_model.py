"""How fast whole models read prompts on the GPU, with random weights in the shapes of real ones.

    python -m benchmarks.prefill_model [--models llama-8b,qwen3-4b,gemma3-4b] [--formats int8,none | all]

Every prompt goes through `Decoder.forward` and the CUDA backend, in steps of at most `--chunk` rows; the
host's clock runs from the first step until the logits of the last row are there. Each model runs in two
processes, one with an empty plan folder and one with the folder that the first has filled: their ready times
and first prompts are the cold and the warm start. A run of its own puts events around every operation, which
gives the parts: products, attention, and the rest, beside the floors that 790 TFLOP/s and 4.2 TB/s set. The
warm process then serves `--served` short prompts, whose blocks leave, and says what memory was held after ten
of them and after all. Writes results/h200/prefill_model.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import cupy  # pyright: ignore[reportMissingImports]
import numpy as np

from benchmarks.machine import RESULTS, gpu_provenance, write
from benchmarks.random_models import CONTEXT, GEMMA3_4B, LLAMA_8B, QWEN3_4B, random_checkpoint
from kvrelay_kernels.cuda.backend import CudaBackend
from kvrelay_kernels.cuda.batch import slots_of
from kvrelay_kernels.interface import StepBatch
from kvrelay_kernels.plans import open_plans
from kvrelay_kernels.quant import BLOCK_TOKENS
from kvrelay_kernels.quant.formats import KNOWN
from model_runtime.config import ModelConfig
from model_runtime.decoder import Decoder
from model_runtime.steps import sequence_steps

FLOPS, BYTES = 790e12, 4.2e12
"""What the card has been seen to reach: bf16 products, and copies (bytes read and written)."""
MIXED = (256, 512, 768, 1024, 1536, 2048, 3072, 4096)
REPEATS = 10
LEAVING_REPEATS = 4
SHORT = (1, 17, 64, 100, 128, 200, 256, 333, 400, 512)
"""Lengths of the prompts that are served to see whether memory grows, again and again."""
PACKAGES = ("numpy", "cupy-cuda13x", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-cudnn-frontend")
MODELS = {config.name: config for config in (LLAMA_8B, QWEN3_4B, GEMMA3_4B)}

PARTS = {
    "embed": "rows", "rms_norm": "rows", "add_rms_norm": "rows", "linear": "products",
    "gated_linear": "gated products", "rope_append": "append", "attention": "attention", "logits": "logits",
}  # fmt: skip


class Timed:
    """A backend with an event before and behind each operation."""

    def __init__(self, backend: CudaBackend) -> None:
        self._backend = backend
        self._marks: list[tuple[str, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        return partial(self._time, PARTS[name], found) if name in PARTS else found

    def _time(self, part: str, work: Callable[..., Any], *args: Any) -> Any:
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record(self._backend.stream)
        result = work(*args)
        end.record(self._backend.stream)
        self._marks.append((part, begin, end))
        return result

    def milliseconds(self) -> dict[str, float]:
        """Of each part, all operations together."""
        self._backend.stream.synchronize()
        sums: dict[str, float] = defaultdict(float)
        for part, begin, end in self._marks:
            sums[part] += cupy.cuda.get_elapsed_time(begin, end)
        return dict(sums)


@dataclass(frozen=True)
class Case:
    """Prompts that come together."""

    name: str
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Of all prompts."""
        return sum(self.lengths)

    def steps(self, chunk: int) -> list[StepBatch]:
        """The prompts in order, cut into steps of at most `chunk` rows; logits of each prompt's last row."""
        rng = np.random.default_rng(self.tokens)
        needed = [-(-length // BLOCK_TOKENS) for length in self.lengths]
        tables = np.zeros((len(self.lengths), max(needed)), np.int32)
        order = rng.permutation(sum(needed)).astype(np.int32)
        for s, start in enumerate(np.cumsum(needed) - needed):
            tables[s, : needed[s]] = order[start : start + needed[s]]
        done, steps = [0] * len(self.lengths), []
        while done != list(self.lengths):
            new, room = [0] * len(done), chunk
            for s, length in enumerate(self.lengths):
                new[s] = min(room, length - done[s])
                room -= new[s]
            some = [s for s, count in enumerate(new) if count]
            batch, _ = sequence_steps([new[s] for s in some], [done[s] for s in some])
            ends = [n for n, s in enumerate(some) if done[s] + new[s] == self.lengths[s]]
            ids = rng.integers(0, 30000, batch.rows).astype(np.int32)
            steps.append(
                replace(batch, token_ids=ids, block_tables=tables[some], logit_rows=batch.logit_rows[ends])
            )
            done = [a + b for a, b in zip(done, new, strict=True)]
        return steps


CASES = (Case("2048", (2048,)), Case("16384", (16384,)), Case("eight", MIXED))


def floors(config: ModelConfig, lengths: Sequence[int], kv_bytes: float) -> dict[str, float]:
    """Milliseconds that each part cannot do without; `kv_bytes` of a token of one layer."""
    tokens, heads = sum(lengths), config.heads * config.head_dim
    qkv = heads + 2 * config.kv_heads * config.head_dim
    gated = 2 * config.hidden * config.intermediate
    weights = config.hidden * (qkv + heads + config.intermediate)
    pairs = 0.0
    for window in config.windows:
        for length in lengths:
            seen = min(window or length, length)
            pairs += seen * (seen + 1) / 2 + (length - seen) * seen
    # Bytes an element: a norm with its sum 12, one behind a block 4, the embedding with the first norm 12.
    rows = tokens * config.hidden * (config.layers * (24 + 8 * config.post_norms) + 12)
    gates = config.layers * tokens * config.intermediate * 6
    append = config.layers * tokens * (2 * qkv + 2 * heads + kv_bytes)
    head = config.vocabulary * config.hidden * 2
    return {
        "products": 2e3 * tokens * config.layers * weights / FLOPS,
        "attention": 4e3 * pairs * heads / FLOPS,
        "rows": 1e3 * rows / BYTES,
        "gated products": config.layers * 2e3 * tokens * gated / FLOPS + 1e3 * gates / BYTES,
        "append": 1e3 * append / BYTES,
        "logits": 1e3 * head / BYTES,
    }


def read_prompts(decoder: Decoder, arena: Any, steps: Sequence[StepBatch], leaving: bool) -> None:
    """Take the steps; `leaving` reads every block back as soon as its layer has it."""
    for step in steps:
        blocks = np.unique(slots_of(step) // BLOCK_TOKENS).tolist()

        def read_back(layer: int, blocks: list[int] = blocks) -> None:
            for block in blocks:
                arena.read_block(layer, block)

        decoder.forward(step, arena, read_back if leaving else None)


def run_case(
    decoder: Decoder, arena: Any, case: Case, chunk: int, repeats: int = REPEATS, leaving: bool = False
) -> list[float]:
    """Seconds of each run."""
    steps, times = case.steps(chunk), []
    for _ in range(repeats):
        begin = time.perf_counter()
        read_prompts(decoder, arena, steps, leaving)
        times.append(time.perf_counter() - begin)
    return times


def serve(decoder: Decoder, arena: Any, prompts: int, chunk: int) -> dict[str, Any]:
    """Memory after the tenth and after the last of so many short prompts, whose blocks leave."""
    cases = [Case(str(length), (length,)).steps(chunk) for length in SHORT]
    begin = time.perf_counter()
    after: dict[str, dict[str, int]] = {}
    for done in range(prompts):
        read_prompts(decoder, arena, cases[done % len(cases)], leaving=True)
        if done + 1 in (len(SHORT), prompts):
            after[str(done + 1)] = memory()
    return {"prompts": prompts, "seconds": time.perf_counter() - begin, "memory_after": after}


def memory() -> dict[str, int]:
    """Bytes in use: of the GPU by all, of it by CuPy's pool, and of the host by this process."""
    free, total = cupy.cuda.runtime.memGetInfo()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "device_bytes": total - free,
        "pool_bytes": cupy.get_default_memory_pool().total_bytes(),
        "host_bytes": pages * resource.getpagesize(),
    }


def time_parts(decoder: Decoder, arena: Any, case: Case, chunk: int) -> dict[str, float]:
    """Milliseconds of each part of one run."""
    backend: Any = decoder.backend
    timed: Any = Timed(backend)
    decoder.backend = timed
    for step in case.steps(chunk):
        decoder.forward(step, arena)
    decoder.backend = backend
    return timed.milliseconds()


def run_model(
    name: str,
    formats: Sequence[str],
    cases: Sequence[str],
    chunk: int,
    served: int,
    folder: Path,
    cold: bool,
) -> dict[str, Any]:
    """One process's measurements of a model."""
    config = MODELS[name]
    begin = time.perf_counter()
    backend: Any = CudaBackend(element="bfloat16", plans=open_plans(folder))
    decoder = Decoder(random_checkpoint(config), backend, "auto")
    backend.stream.synchronize()
    loaded = time.perf_counter()
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    result: dict[str, Any] = {"model": name, "cold": cold, "chunk": chunk, "weight_bytes": pool.used_bytes()}
    rows = []
    for kv_format in formats:
        arena = decoder.new_arena(-(-sum(MIXED) // BLOCK_TOKENS) + CONTEXT // BLOCK_TOKENS, kv_format)
        warm_from = time.perf_counter()
        decoder.warm(arena, chunk, 8)
        backend.stream.synchronize()
        ready = time.perf_counter()
        if "ready_seconds" not in result:
            result |= {"load_seconds": loaded - begin, "ready_seconds": ready - begin}
            result |= {"warm_seconds": ready - warm_from, "plans_until_ready": plan_counts(backend)}
        if cold and kv_format != formats[0]:
            continue  # compiled and measured for the warm start
        kv_bytes = arena.layout.block_bytes / BLOCK_TOKENS
        for case in CASES[:1] if cold else [case for case in CASES if case.name in cases]:
            times = run_case(decoder, arena, case, chunk)
            parts = time_parts(decoder, arena, case, chunk)
            leaving = run_case(decoder, arena, case, chunk, LEAVING_REPEATS, leaving=True)
            rows.append({
                "format": kv_format, "case": case.name, "tokens": case.tokens,
                "first_seconds": times[0], "seconds": times,
                "tokens_per_second": case.tokens / median(times[1:]),
                "tokens_per_second_blocks_leaving": case.tokens / median(leaving[1:]),
                "first_over_tenth": times[0] / times[-1],
                "parts_milliseconds": parts, "floors_milliseconds": floors(config, case.lengths, kv_bytes),
            })  # fmt: skip
            print_row(name, rows[-1])
        if "first_over_tenth" not in result:
            result["first_over_tenth"] = rows[0]["first_over_tenth"]
        result["peak_memory"] = max(memory(), result.get("peak_memory", memory()), key=peak)
        if not cold and kv_format == formats[-1]:
            result["served"] = serve(decoder, arena, served, chunk)
        del arena
        pool.free_all_blocks()
    return result | {"rows": rows, "plans": plan_counts(backend)}


def peak(found: dict[str, int]) -> int:
    """What decides which of two readings of `memory` is the peak."""
    return found["device_bytes"]


def plan_counts(backend: CudaBackend) -> dict[str, Any]:
    """Plans found and built by the backend's caches."""
    counts = backend.plan_counts
    return {"built": counts.builds, "hits": dict(counts.hits), "misses": counts.misses}


def print_row(name: str, row: dict[str, Any]) -> None:
    """A line of the table."""
    parts, least = row["parts_milliseconds"], row["floors_milliseconds"]
    print(
        f"{name:10} {row['format']:6} {row['case']:6} {row['tokens_per_second']:8.0f} tok/s"
        f" ({row['tokens_per_second_blocks_leaving']:.0f} with blocks leaving)"
        f"  first {1e3 * row['first_seconds']:7.1f} ms, tenth {1e3 * row['seconds'][-1]:7.1f};"
        + "".join(f" {part} {parts[part]:.1f}/{least[part]:.1f}" for part in least),
        flush=True,
    )


def print_start(run: dict[str, Any]) -> None:
    """A line about a process."""
    print(
        f"{run['model']}: {'cold' if run['cold'] else 'warm'} start, ready in {run['ready_seconds']:.1f} s"
        f" (loading {run['load_seconds']:.1f}), first prompt {run['first_over_tenth']:.2f} of the tenth;"
        f" plans built until ready {run['plans_until_ready']['built']}, in all {run['plans']['built']};"
        f" {run['peak_memory']['device_bytes'] / 2**30:.1f} GiB of the GPU in use, {run.get('served', '')}",
        flush=True,
    )


def child(model: str, options: argparse.Namespace, folder: Path, cold: bool) -> dict[str, Any]:
    """Measure a model in a process of its own."""
    command = [
        sys.executable, "-m", "benchmarks.prefill_model", "--one", model, "--folder", str(folder),
        "--formats", options.formats, "--cases", options.cases,
        "--chunk", str(options.chunk), "--served", str(options.served), *(["--cold"] if cold else []),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    print("\n".join(lines), flush=True)
    return json.loads(last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--formats", default="int8,none")
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--served", type=int, default=1000, help="short prompts for the check of memory")
    parser.add_argument("--commit", help="name of the commit, where the checkout has no repository")
    parser.add_argument("--out", type=Path, default=RESULTS / "h200" / "prefill_model.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    formats = KNOWN if options.formats == "all" else options.formats.split(",")
    if options.one:
        print(
            json.dumps(
                run_model(
                    options.one,
                    formats,
                    options.cases.split(","),
                    options.chunk,
                    options.served,
                    options.folder,
                    options.cold,
                )
            )
        )
        return
    head, runs = gpu_provenance(PACKAGES, options.commit), []
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            for cold in (True, False):
                runs.append(child(model, options, Path(folder), cold))
                print_start(runs[-1])
        write(head | {"runs": runs}, options.out)


if __name__ == "__main__":
    main()
