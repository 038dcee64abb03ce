// In place of the kernels' own primitives: CUDA C++ as C++17 on an ordinary processor. It checks arithmetic and
// addresses, and hangs up on divergent barriers; it shows nothing of NVIDIA's compiler or of speed.
//
// Every thread of a thread block is a fiber; thread blocks run one behind the other. A fiber that comes to a barrier,
// of its warp or of its thread block, gives way until all the others have come to it.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using std::max;
using std::min;

#define DEVICE static inline
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float4 { float x, y, z, w; };
struct Index { int x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;
constexpr u32 every_lane = 0xffffffffu;

namespace host {
struct Barrier {
    int arrived = 0, generation = 0;
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    bool done;
};
static std::vector<Fiber> fibers;
static std::vector<Barrier> warps;
static Barrier block;
static std::vector<u32> exchanged;
static ucontext_t scheduler;
static int current;

static void wait_at(Barrier& barrier, int count) {
    const int generation = barrier.generation;
    if (++barrier.arrived == count) barrier.arrived = 0, barrier.generation++;
    while (barrier.generation == generation) {
        const int me = current;
        swapcontext(&fibers[me].context, &scheduler);
        threadIdx.x = me;
    }
}

template <class F>
static auto exchange(u32 word, F read) {
    Barrier& warp = warps[threadIdx.x / 32];
    exchanged[threadIdx.x] = word;
    wait_at(warp, 32);
    const auto result = read(exchanged.data() + threadIdx.x / 32 * 32);
    wait_at(warp, 32);
    return result;
}
template <class T>
static T read_as(const void* from) {
    T to;
    std::memcpy(&to, from, sizeof to);
    return to;
}
}  // namespace host

static void __syncthreads() { host::wait_at(host::block, blockDim.x); }
static void __syncwarp() { host::wait_at(host::warps[threadIdx.x / 32], 32); }
template <class T>
static T __shfl_sync(u32, T x, int lane) {
    using namespace host;
    return exchange(read_as<u32>(&x), [=](const u32* words) { return read_as<T>(words + (lane & 31)); });
}
template <class T>
static T __shfl_xor_sync(u32, T x, int mask) {
    return __shfl_sync(every_lane, x, threadIdx.x % 32 ^ mask);
}
static bool __any_sync(u32, bool x) {
    return host::exchange(x, [](const u32* words) { return std::any_of(words, words + 32, [](u32 w) { return w; }); });
}

template <class T>
static T __ldg(const T* from) { return *from; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __fdividef(float a, float b) { return a / b; }
static float __frsqrt_rn(float x) { return float(1 / std::sqrt(double(x))); }
static int __float2int_rn(float x) { return int(std::nearbyint(x)); }
static float exp2_fast(float x) { return std::exp2(x); }

static float low_bfloat(u32 pair) { return pair <<= 16, host::read_as<float>(&pair); }
static float high_bfloat(u32 pair) { return pair &= 0xffff0000u, host::read_as<float>(&pair); }
static float low_half(u32 pair) { return float(host::read_as<_Float16>(&pair)); }
static float high_half(u32 pair) { return pair >>= 16, low_half(pair); }
template <bool bfloat16>
static u32 round_16(float x) {
    if constexpr (bfloat16) {
        const u32 word = host::read_as<u32>(&x);
        return (word + 0x7fff + (word >> 16 & 1)) >> 16;
    } else {
        const _Float16 half = x;
        return host::read_as<u16>(&half);
    }
}
template <bool bfloat16>
static u32 pack(float low, float high) { return round_16<bfloat16>(low) | round_16<bfloat16>(high) << 16; }

namespace host {
static void (*body)();
static void enter() {
    body();
    fibers[current].done = true;
    swapcontext(&fibers[current].context, &scheduler);
}

// Runs every thread of one thread block to its end; a round in which nobody gets on is a barrier not all come to.
static void run_block(int threads) {
    fibers.resize(threads), warps.assign(threads / 32, {}), exchanged.assign(threads, 0), block = {};
    for (Fiber& fiber : fibers) {
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, enter, 0);
    }
    for (int left = threads, before = -1, generations = -1; left > 0;) {
        left = 0;
        for (current = 0; current < threads; current++) {
            if (fibers[current].done) continue;
            threadIdx.x = current;
            swapcontext(&scheduler, &fibers[current].context);
            left += !fibers[current].done;
        }
        int now = block.generation;
        for (const Barrier& warp : warps) now += warp.generation;
        if (left == before && now == generations) throw std::runtime_error("a barrier that not all threads come to");
        before = left, generations = now;
    }
}

static void** arguments;
template <class... P, std::size_t... i>
static void call(void (*kernel)(P...), std::index_sequence<i...>) {
    kernel(*static_cast<P*>(arguments[i])...);
}
template <class... P>
static void call(void (*kernel)(P...)) {
    call(kernel, std::index_sequence_for<P...>());
}
}  // namespace host
