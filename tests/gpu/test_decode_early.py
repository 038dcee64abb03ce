"""Decode attention begins before the kernel ahead has ended, and reads nothing that it writes too soon."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvrelay_kernels.cuda import nvrtc
from kvrelay_kernels.cuda.decode_attention import DecodeAttention, DecodeProblem
from kvrelay_kernels.cuda.decode_rows import Kernel as Attention
from kvrelay_kernels.cuda.decode_single_pass import SinglePass
from kvrelay_kernels.cuda.launch import Kernel
from kvrelay_kernels.cuda.module import SOURCES, KernelCache, device_arch
from tests.gpu.paged_cache import DTYPES, exact_attention, random_cache
from tests.gpu.test_decode_attention import bound, make, relative_error

# Lets the next kernel in at once, and copies late.
LATE_COPY = """
#include "primitives.cuh"
extern "C" __global__ void late_copy(volatile u32* to, const u32* from, u64 words, u64 nanoseconds) {
    release_dependents();
    await_producers();
    u64 begin, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin) :: "memory");
    do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now) :: "memory");
    while (now < begin + nanoseconds);
    const u32 threads = gridDim.x * blockDim.x;
    for (u64 n = blockIdx.x * blockDim.x + threadIdx.x; n < words; n += threads) to[n] = from[n];
}
"""
BLOCKS, THREADS, LATE = 64, 64, 20_000
LENGTHS = [1, 65, 641, 3009, 0, 129]
"""The newest token of each lies alone in its block."""

NEW: dict[str, Callable[[DecodeProblem, KernelCache], Attention]] = {
    "split-k": lambda problem, kernels: DecodeAttention(problem, len(LENGTHS), kernels),
    "single pass": SinglePass,
    "in clusters": lambda problem, kernels: SinglePass(problem, kernels, cluster=2),
}


@pytest.fixture(scope="module")
def late_copy(cupy: Any) -> Callable[[Any, Any], None]:
    headers = {path.name: path.read_text() for path in SOURCES.glob("*.cuh")}
    options = ["--std=c++17", "-default-device", f"--gpu-architecture={device_arch()}"]
    module = cupy.cuda.function.Module()
    module.load(nvrtc.compile_cubin(LATE_COPY, headers, options))
    kernel = Kernel(module.get_function("late_copy"), False)
    return lambda to, given: kernel((BLOCKS,), (THREADS,), (to, given, given.nbytes // 4, LATE))


@pytest.mark.parametrize("fmt", ["none", "int8-g64", "turbo3"])
@pytest.mark.parametrize("kind", NEW)
def test_what_the_kernel_ahead_writes(
    cupy: Any, kernels: KernelCache, late_copy: Callable[[Any, Any], None], kind: str, fmt: str
) -> None:
    """The queries, and the newest token's block; behind a plan, and behind an earlier layer."""
    problem, rng = make(fmt, 128, "bfloat16"), np.random.default_rng(len(fmt))
    if kind == "in clusters" and device_arch() < "sm_90":
        pytest.skip("this GPU has no thread-block clusters")
    cache = random_cache(rng, problem.layout, LENGTHS)
    q = rng.standard_normal((len(LENGTHS), 32, 128)).astype(DTYPES["bfloat16"])
    spoilt = cache.arena.copy()
    for table, length in zip(cache.tables, LENGTHS, strict=True):
        if length:
            spoilt[table[length // 64]] = 0xFF
    ready, early = cupy.asarray(cache.arena[None]), cupy.asarray(spoilt[None])
    arena, queries = cupy.empty_like(ready), cupy.empty(q.shape, np.uint16)
    given, lengths, tables = (cupy.asarray(a) for a in (q.view(np.uint16), cache.lengths, cache.tables))
    out = cupy.full((2, *q.shape), 0xFFFF, np.uint16)
    attention = NEW[kind](problem, kernels)
    attention.attach(arena)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        stream.begin_capture()
        for layer in range(2):
            arena.data.copy_from_device_async(early.data, early.nbytes, stream)
            queries.data.memset_async(0xFF, queries.nbytes, stream)
            if layer == 0:
                attention.plan(lengths)
            late_copy(arena, ready)
            late_copy(queries, given)
            attention(queries, 0, tables, out[layer])
        graph = stream.end_capture()
        for _ in range(20):
            out[...] = 0xFFFF
            graph.launch(stream)
        stream.synchronize()
    want = exact_attention(q, cache, problem.spec, 1)
    for found in out.get().view(q.dtype).astype(np.float32):
        assert relative_error(found, want) < bound(want, "bfloat16")


@pytest.mark.parametrize("kind", NEW)
def test_tables_that_changed_since_the_last_step(
    cupy: Any, kernels: KernelCache, late_copy: Callable[[Any, Any], None], kind: str
) -> None:
    """They come from the host, to where the last step's lay, and are read ahead of the wait."""
    problem, rng = make("int8-g64", 128, "bfloat16"), np.random.default_rng(11)
    if kind == "in clusters" and device_arch() < "sm_90":
        pytest.skip("this GPU has no thread-block clusters")
    cache = random_cache(rng, problem.layout, LENGTHS)
    turned = replace(
        cache, tables=cache.tables[::-1].copy(), lengths=cache.lengths[::-1].copy(), keys=cache.keys[::-1],
        values=cache.values[::-1],
    )  # fmt: skip
    q = rng.standard_normal((len(LENGTHS), 32, 128)).astype(DTYPES["bfloat16"])
    wanted = [exact_attention(q, each, problem.spec, 1) for each in (cache, turned)]
    given, queries = cupy.asarray(q.view(np.uint16)), cupy.empty(q.shape, np.uint16)
    lengths, tables = cupy.asarray(cache.lengths), cupy.asarray(cache.tables)
    out = cupy.empty(q.shape, np.uint16)
    attention = NEW[kind](problem, kernels)
    attention.attach(cupy.asarray(cache.arena[None]))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        stream.begin_capture()
        late_copy(queries, given)
        attention.plan(lengths)
        late_copy(queries, given)
        attention(queries, 0, tables, out)
        late_copy(queries, given)
        attention(queries, 0, tables, out)
        graph = stream.end_capture()
        for step in range(40):
            now = (cache, turned)[step % 2]
            lengths.set(now.lengths, stream)
            tables.set(now.tables, stream)
            queries.data.memset_async(0xFF, queries.nbytes, stream)
            graph.launch(stream)
            stream.synchronize()
            found = out.get().view(q.dtype).astype(np.float32)
            assert relative_error(found, wanted[step % 2]) < bound(wanted[step % 2], "bfloat16")
