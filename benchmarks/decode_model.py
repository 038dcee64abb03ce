"""How fast whole models write answers on the GPU, with random weights in the shapes of real ones.

    python -m benchmarks.decode_model [--quick] [--models llama-8b] [--weights bf16,int4] [--route NAME]
        [--no-parts] [--no-overlap]

A case is a number of sequences of one length in a cache of one format. The cache is not the work of a
prefill: its blocks are filled with random keys and values, coded as the format codes them, and lie in random
order. Then the decode engine's own way of taking steps (`Decoder.new_token_steps`) runs ahead by one: step
n + 1 is launched, then the tokens of step n are read. Step times are those between two such readings; streams
are greedy but for a second run, `drawn`, at temperature 0.8 and top-p 0.95.

Host time is what a step takes of the host while steps follow each other so: its launch, beside the step that
is under way, and the reading of tokens that are there; waiting for the device does not count. The parts are
differences: a step of which only one kind of operation is recorded, less one that is empty; what they leave
of the step is called `rest`: the draw, and what lies between kernels, less than nothing where kernels of
several kinds overlap. With `--no-overlap` each kernel begins when the one ahead has ended. The floor is the
time in which a kernel that only reads gets through the weights and the cache, in the same run. Each model and
kind of weights has a process of its own. Writes results/h200/decode_model.json.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

from benchmarks.machine import RESULTS, gpu_provenance, write
from benchmarks.random_models import LLAMA_8B, QWEN3_4B, SMOLLM2_135M, random_checkpoint
from kvrelay_kernels.errors import KernelError
from kvrelay_kernels.interface import FROM_DEVICE, StepBatch
from kvrelay_kernels.plans import default_plan_folder, open_plans
from kvrelay_kernels.quant import BLOCK_TOKENS
from model_runtime.decoder import Decoder
from model_runtime.sampler import Sampled, SamplingConfig
from model_runtime.token_steps import TokenSteps

MODELS = {config.name: config for config in (LLAMA_8B, QWEN3_4B, SMOLLM2_135M)}
WEIGHTS = {"bf16": 16, "int8": 8, "fp8": 8, "int4": 4}
STEPS = 64
"""Timed ones; as many tokens are the answers longer at the end."""
WARM_STEPS = 4
GREEDY = SamplingConfig(temperature=0.0, ignore_eos=True)
DRAWN = SamplingConfig(temperature=0.8, top_p=0.95, ignore_eos=True)
REPEATS = 20
"""Of a step of one part."""
PACKAGES = ("numpy", "cupy-cuda13x", "nvidia-cublas")


@dataclass(frozen=True)
class Case:
    """Sequences that write together."""

    cache: str
    batch: int
    length: int
    """Tokens in the cache of each when the first step begins."""
    parts: bool = False
    """Whether the step is taken apart."""

    @property
    def blocks(self) -> int:
        """Of each sequence, with room for its answer."""
        return -(-(self.length + WARM_STEPS + STEPS + 1) // BLOCK_TOKENS)


QUICK = [
    Case("none", 1, 2048, parts=True),
    Case("int8", 32, 2048),
    Case("int8", 32, 8192, parts=True),
    Case("int4", 32, 8192),
    Case("int8", 128, 2048),
]
CASES = [
    *(Case("int8", batch, length, batch in {1, 32}) for length in (2048, 8192) for batch in (1, 8, 32, 128)),
    *(
        Case(cache, batch, length)
        for cache in ("none", "int4")
        for batch in (1, 32)
        for length in (2048, 8192)
    ),
]


@dataclass(eq=False)
class Stream:
    """A sequence that writes, as token steps ask for it."""

    sampling: SamplingConfig
    prompt_ids: list[int]
    answer_ids: list[int] = field(default_factory=lambda: [1])


class Batches:
    """The steps of a case, one behind the other."""

    def __init__(self, case: Case) -> None:
        self.case = case
        order = np.random.default_rng(0).permutation(case.batch * case.blocks).astype(np.int32)
        self._tables = order.reshape(case.batch, case.blocks)
        self._rows = np.arange(case.batch + 1, dtype=np.int32)

    def step(self, number: int, token_ids: Sequence[int] | None = None) -> StepBatch:
        """A step's batch; the device knows the tokens where the host does not."""
        past = np.full(self.case.batch, self.case.length + number, np.int32)
        ids = np.full(self.case.batch, FROM_DEVICE, np.int32)
        if token_ids is not None:
            ids[:] = token_ids
        used = -(-(self.case.length + number + 1) // BLOCK_TOKENS)
        tables = np.ascontiguousarray(self._tables[:, :used])
        return StepBatch(ids, past, self._rows, past + np.int32(1), tables, self._rows[:-1])


def open_streams(steps: TokenSteps, case: Case, sampling: SamplingConfig) -> list[Stream]:
    """The streams of a case, which have joined."""
    streams = [Stream(sampling, [1] * case.length) for _ in range(case.batch)]
    for stream in streams:
        steps.join(stream)
    return streams


def step_seconds(steps: TokenSteps, streams: Sequence[Stream], batches: Batches) -> list[float]:
    """Seconds between the readings of two steps' tokens, of `STEPS` steps behind a few that warm up."""
    read: list[float] = []
    before = steps.launch(batches.step(0, [stream.answer_ids[-1] for stream in streams]), streams)
    for number in range(1, WARM_STEPS + STEPS + 1):
        tokens = _tokens(before.wait()) if before.done else None
        flight = steps.launch(batches.step(number, tokens), streams)
        if tokens is None:
            _tokens(before.wait())
        read.append(time.perf_counter())
        before = flight
    _tokens(before.wait())
    return np.diff(read[WARM_STEPS - 1 :]).tolist()


def host_seconds(steps: TokenSteps, streams: Sequence[Stream], batch: StepBatch) -> list[float]:
    """Seconds of the host that each step takes: a launch, and the reading of the tokens of the one ahead."""
    times: list[float] = []
    before = steps.launch(batch, streams)
    for _ in range(STEPS):
        begin = time.perf_counter()
        flight = steps.launch(batch, streams)
        launched = time.perf_counter()
        while not before.done:
            pass
        settled = time.perf_counter()
        _tokens(before.wait())
        times.append(launched - begin + time.perf_counter() - settled)
        before = flight
    _tokens(before.wait())
    return times


def _tokens(outcomes: Iterable[Sampled | KernelError]) -> list[int]:
    tokens: list[int] = []
    for outcome in outcomes:
        if isinstance(outcome, KernelError):
            raise outcome
        tokens.append(outcome.token_id)
    return tokens


PARTS = {
    "linear": "products", "attention": "attention", "rope_append": "append", "embed": "rows",
    "rms_norm": "rows", "add_rms_norm": "rows", "gated_linear": "products", "logits": "head",
}  # fmt: skip
"""Of which part each operation is."""


def plain_rows(rows: int) -> StepBatch:
    """A step of so many sequences with one row each, of which nothing is known."""
    zeros, every = np.zeros(rows, np.int32), np.arange(rows + 1, dtype=np.int32)
    return StepBatch(zeros, zeros, every, zeros, np.zeros((rows, 1), np.int32), every[:-1])


class OnePart:
    """Lets a backend compute the operations of one part; all others give what they gave the first time.

    That first time everything is computed, so that nothing lacks, and nothing is allocated later.
    """

    def __init__(self, part: str) -> None:
        self._part = part
        self._known: dict[Any, Any] = {}

    def over(self, backend: Any) -> "_Parted":
        """In the place of `backend`, or of what stands in for it while it records."""
        return _Parted(backend, self._run)

    def _run(self, backend: Any, name: str, *args: Any) -> Any:
        shapes = tuple(getattr(arg, "shape", None) or getattr(arg, "n", None) for arg in args)
        if (name, shapes) not in self._known:
            self._known[name, shapes] = getattr(backend, name)(*args)
        elif name == "logits" and self._part == PARTS[name]:
            # The real step leaves logits on the device.
            backend.linear(*args[:2], plain_rows(len(args[2])))
        elif PARTS[name] == self._part:
            self._known[name, shapes] = getattr(backend, name)(*args)
        return self._known[name, shapes]


class _Parted:
    def __init__(self, backend: Any, run: Callable[..., Any]) -> None:
        self._backend = backend
        self._run = run

    def __getattr__(self, name: str) -> Any:
        return partial(self._run, self._backend, name) if name in PARTS else getattr(self._backend, name)


def part_milliseconds(
    decoder: Decoder, arena: Any, batch: StepBatch, settle: Callable[[], None]
) -> dict[str, float]:
    """Of each part, in a recorded step of its operations alone."""
    plain = StepBatch(
        np.ones_like(batch.token_ids), batch.positions, batch.row_starts, batch.lengths, batch.block_tables,
        batch.logit_rows,
    )  # fmt: skip
    step = decoder.step(arena)

    def time_part(part: str) -> float:
        one = OnePart(part)
        recorded = decoder.backend.record(lambda backend, b: step(one.over(backend), b), batch.rows, arena)
        recorded(plain)
        times: list[float] = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            recorded(plain)
            settle()
            times.append(time.perf_counter() - begin)
        return 1e3 * median(times)

    empty = time_part("")
    return {part: time_part(part) - empty for part in dict.fromkeys(PARTS.values())}


def fill_arena(arena: Any) -> None:
    """Random keys and values in every block."""
    import cupy  # pyright: ignore[reportMissingImports]

    from benchmarks.decode_attention import random_blocks

    some = random_blocks(arena.layout, min(256, arena.blocks))
    for layer in range(arena.layers):
        for at in range(0, arena.blocks, len(some)):
            place = arena.bytes[layer, at : at + len(some)]
            place[...] = some[cupy.random.permutation(len(some))][: len(place)]


def run_case(decoder: Decoder, case: Case, weight_bytes: int, peak: float) -> dict[str, Any]:
    """One case's row."""
    backend: Any = decoder.backend
    arena: Any = decoder.new_arena(case.batch * case.blocks, case.cache)
    fill_arena(arena)
    backend.stream.synchronize()
    steps, batches = decoder.new_token_steps(arena, case.batch), Batches(case)
    streams = open_streams(steps, case, GREEDY)
    seconds = step_seconds(steps, streams, batches)
    last = batches.step(WARM_STEPS + STEPS)
    host = host_seconds(steps, streams, last)
    for stream in streams:
        steps.leave(stream)
    drawn = step_seconds(steps, open_streams(steps, case, DRAWN), batches)
    token_bytes = sum(frame.nbytes for frame in arena.layout.frames) / BLOCK_TOKENS * arena.layers
    cache_bytes = case.batch * (case.length + STEPS / 2) * token_bytes
    floor = 1e3 * (weight_bytes + cache_bytes) / peak
    step = 1e3 * median(seconds)
    cuts, host_cuts = (quantiles([1e3 * one for one in times], n=10) for times in (seconds, host))
    row: dict[str, Any] = {
        **asdict(case),
        "tokens_per_second": 1e3 * case.batch / step,
        "step_milliseconds": {"median": step, "p10": cuts[0], "p90": cuts[-1]},
        "drawn_step_milliseconds": 1e3 * median(drawn),
        "host_milliseconds": {"median": 1e3 * median(host), "p90": host_cuts[-1]},
        "cache_bytes": cache_bytes,
        "floor_milliseconds": floor,
        "fraction_of_floor": floor / step,
    }
    if case.parts:
        parts = part_milliseconds(decoder, arena, last, backend.stream.synchronize)
        row["parts_milliseconds"] = {**parts, "rest": step - sum(parts.values())}
    return row


def run_model(
    name: str, weights: str, cases: Sequence[Case], route: Any = None, overlap: bool = True
) -> dict[str, Any]:
    """One process's measurements of a model."""
    import cupy  # pyright: ignore[reportMissingImports]

    from benchmarks.decode_attention import read_bandwidth
    from kvrelay_kernels.cuda.backend import CudaBackend

    pool, config = cupy.get_default_memory_pool(), MODELS[name]
    begin = time.perf_counter()
    backend: Any = CudaBackend(
        element="bfloat16", plans=open_plans(default_plan_folder()), decode_route=route, overlap=overlap
    )
    decoder = Decoder(random_checkpoint(config, weights), backend)
    backend.stream.synchronize()
    loaded = time.perf_counter() - begin
    pool.free_all_blocks()
    held = pool.used_bytes()
    table = 0 if config.tied_embeddings else config.vocabulary * config.hidden * WEIGHTS[weights] // 8
    peak = read_bandwidth(cupy.cuda.Stream(non_blocking=True))
    pool.free_all_blocks()
    rows: list[dict[str, Any]] = []
    for case in cases:
        try:
            row = run_case(decoder, case, held - table, peak)
        except MemoryError as error:
            print(f"{name} {weights} {case}: {error}", flush=True)
            continue
        finally:
            backend.recorded.free_all_blocks()
            pool.free_all_blocks()
        rows.append(row)
        print_row(name, weights, row)
    return {
        "model": name, "weights": weights, "route": route, "overlap": overlap, "load_seconds": loaded,
        "weight_bytes": held, "read_weight_bytes": held - table, "read_bytes_per_second": peak, "rows": rows,
    }  # fmt: skip


def print_row(name: str, weights: str, row: dict[str, Any]) -> None:
    """A line of the table."""
    step, host = row["step_milliseconds"], row["host_milliseconds"]
    print(
        f"{name:12} {weights:5} cache {row['cache']:5} {row['batch']:4} x {row['length']:<6}"
        f" {row['tokens_per_second']:8.0f} tok/s, step {step['median']:7.3f} ms"
        f" ({step['p10']:.3f} to {step['p90']:.3f}), drawn {row['drawn_step_milliseconds']:.3f},"
        f" host {host['median']:.3f} (to {host['p90']:.3f}),"
        f" floor {row['floor_milliseconds']:7.3f} ({row['fraction_of_floor']:.0%})"
        + "".join(f" {part} {spent:.3f}" for part, spent in row.get("parts_milliseconds", {}).items()),
        flush=True,
    )


def child(model: str, weights: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a model in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.decode_model",
        "--one",
        "--models",
        model,
        "--weights",
        weights,
    ]
    command += ["--quick"] * options.quick + (["--route", options.route] if options.route else [])
    command += ["--no-parts"] * (not options.parts) + ["--no-overlap"] * (not options.overlap)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        last = ""
        for line in process.stdout or ():
            print(last, end="", flush=True)
            last = line
    if process.returncode:
        raise SystemExit(f"{model} with weights in {weights} failed")
    return json.loads(last)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", help="by default all; llama-8b alone where it is to be quick")
    parser.add_argument("--weights", help="by default bf16,int8,fp8,int4; bf16,int4 where it is to be quick")
    parser.add_argument("--quick", action="store_true", help="few cases")
    parser.add_argument("--route", help="force decode attention's: split-k, single-pass or cudnn")
    parser.add_argument(
        "--parts", action=argparse.BooleanOptionalAction, default=True, help="take some steps apart"
    )
    parser.add_argument(
        "--overlap", action=argparse.BooleanOptionalAction, default=True, help="let kernels overlap"
    )
    parser.add_argument("--commit", help="name of the commit, where the checkout has no repository")
    parser.add_argument("--out", type=Path, default=RESULTS / "h200" / "decode_model.json")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    models = (options.models or ("llama-8b" if options.quick else ",".join(MODELS))).split(",")
    weights = (options.weights or ("bf16,int4" if options.quick else ",".join(WEIGHTS))).split(",")
    if options.one:
        cases = QUICK if options.quick else CASES
        cases = [replace(case, parts=case.parts and options.parts) for case in cases]
        print(json.dumps(run_model(models[0], weights[0], cases, options.route, options.overlap)))
        return
    runs = [child(model, kind, options) for model in models for kind in weights]

    head = gpu_provenance(PACKAGES, options.commit)
    write(head | {"runs": runs}, options.out)


if __name__ == "__main__":
    main()
