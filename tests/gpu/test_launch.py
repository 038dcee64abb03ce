"""Kernels that begin before the ones ahead have ended: they do, and none reads or writes too soon."""

from typing import Any

import numpy as np
import pytest

from kvrelay_kernels.cuda import nvrtc
from kvrelay_kernels.cuda.launch import Kernel, device_overlaps_kernels
from kvrelay_kernels.cuda.module import SOURCES, device_arch

# A thread writes a wrong number, lingers, and then writes the right one, made of another thread block's.
LINK = """
#include "primitives.cuh"
DEVICE u64 now() {
    u64 nanoseconds;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds) :: "memory");
    return nanoseconds;
}
DEVICE void linger(int nanoseconds) {
    for (const u64 begin = now(); now() < begin + nanoseconds;) {}
}
extern "C" __global__ void link(const u32* from, volatile u32* to, int count, int stride, int nanoseconds) {
    release_dependents();
    await_producers();
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    to[n] = 0xdeadbeef;
    if (blockIdx.x % 5 == stride % 5) linger(nanoseconds);
    to[n] = from[(n + stride) % count] * 1664525u + 1013904223u;
}
extern "C" __global__ void clock(u64* times, int nanoseconds) {
    release_dependents();
    const u64 begun = now();
    await_producers();
    if (threadIdx.x == 0) times[0] = begun;
    linger(nanoseconds);
    if (threadIdx.x == 0) times[1] = now();
}
"""
THREADS, BLOCKS = 128, 96
COUNT = THREADS * BLOCKS
LINKS = 3000
LATE = 3000
"""Nanoseconds."""


def load(cupy: Any, name: str, overlaps: bool) -> Kernel:
    headers = {path.name: path.read_text() for path in SOURCES.glob("*.cuh")}
    options = ["--std=c++17", "-default-device", f"--gpu-architecture={device_arch()}"]
    module = cupy.cuda.function.Module()
    module.load(nvrtc.compile_cubin(LINK, headers, options))
    return Kernel(module.get_function(name), overlaps)


def run(cupy: Any, captured: bool, work: Any) -> None:
    """Have `work` done on a stream of its own, or taken down there and launched twice."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        if captured:
            stream.begin_capture()
            work(stream)
            graph = stream.end_capture()
            graph.launch(stream)
            graph.launch(stream)
        else:
            work(stream)
        stream.synchronize()


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("buffers", [2, 3])
def test_a_chain_of_kernels(cupy: Any, captured: bool, buffers: int) -> None:
    """Each reads what the one ahead wrote, and writes where one before it read; others come in between."""
    overlapping = load(cupy, "link", device_overlaps_kernels())
    plain = load(cupy, "link", False)
    first = np.random.default_rng().integers(0, 1 << 32, COUNT, np.uint32)
    memory = cupy.full((buffers, COUNT), 0xABADCAFE, np.uint32)
    copy = cupy.empty(COUNT, np.uint32)
    given, runtime = cupy.asarray(first), cupy.cuda.runtime
    cupy.cuda.get_current_stream().synchronize()

    def strides() -> list[int]:
        return [int(stride) for stride in np.random.default_rng(0).integers(1, COUNT, LINKS)]

    def chain(stream: Any) -> None:
        source = given
        for number, stride in enumerate(strides()):
            to = memory[number % buffers]
            kernel = plain if number % 13 == 5 else overlapping
            late = np.int32(LATE if number % 3 == 0 else 0)
            kernel((BLOCKS,), (THREADS,), (source, to, np.int32(COUNT), np.int32(stride), late))
            if number % 17 == 3:
                runtime.memcpyAsync(
                    copy.data.ptr, to.data.ptr, to.nbytes, runtime.memcpyDeviceToDevice, stream.ptr
                )
            if number % 11 == 4:
                cupy.bitwise_xor(to, np.uint32(number), out=to)
            source = to

    run(cupy, captured, chain)
    wanted, copied = first, first
    for number, stride in enumerate(strides()):
        wanted = np.roll(wanted, -stride) * np.uint32(1664525) + np.uint32(1013904223)
        if number % 17 == 3:
            copied = wanted
        if number % 11 == 4:
            wanted = wanted ^ np.uint32(number)
    assert np.array_equal(memory[(LINKS - 1) % buffers].get(), wanted)
    assert np.array_equal(copy.get(), copied)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("overlaps", [False, True])
def test_kernels_overlap_where_they_may(cupy: Any, captured: bool, overlaps: bool) -> None:
    if not device_overlaps_kernels():
        pytest.skip("this GPU or its driver runs kernels one behind the other")
    kernel = load(cupy, "clock", overlaps)
    times = cupy.zeros((2, 2), np.uint64)
    cupy.cuda.get_current_stream().synchronize()

    def two(stream: Any) -> None:
        # The first is long, so that the second is there in time.
        for number in range(2):
            kernel((1,), (32,), (times[number], np.int32(2_000_000)))

    run(cupy, captured, two)
    (_, first_ended), (second_begun, _) = times.get().tolist()
    assert (second_begun < first_ended) == overlaps
