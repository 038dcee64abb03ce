// In place of the kernels' own primitives: CUDA C++ as C++17 on an ordinary processor. It checks arithmetic, addresses,
// waits and divergent barriers; it shows nothing of NVIDIA's compiler or of speed, and sums of matrix instructions are
// rounded once where tensor cores cut off bits.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using std::max;
using std::min;

#define DEVICE inline
#define __global__
#define __grid_constant__
#define __device__
#define __noinline__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __cluster_dims__(...)

struct uint2 { u32 x, y; };
struct __align__(16) uint4 { u32 x, y, z, w; };
struct int2 { int x, y; };
struct __align__(16) int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
struct TensorMap { u64 words[16]; };
constexpr u32 every_lane = 0xffffffffu;

#include "fibers.h"
#include "shared_memory.h"
#include "cluster.h"
#include "warp.h"

// Vectors are loaded whole, from multiples of their size.
template <class T>
static T __ldg(const T* from) {
    if (u64(from) % alignof(T)) host::stop("a load from a misaligned address");
    return *from;
}
static float4 load_fresh(const float4* from) { return __ldg(from); }
static int load_fresh(const int* from) { return __ldg(from); }
static u32 load_fresh(const u32* from) { return __ldg(from); }
static uint2 load_fresh(const uint2* from) { return __ldg(from); }
static uint4 load_fresh(const uint4* from) { return __ldg(from); }
template <class T>
static T load_near(const T* from) {
    return __ldg(from);
}
static uint4 load_once(const uint4* from) { return __ldg(from); }
static uint2 load_once(const uint2* from) { return __ldg(from); }
// What thread blocks hand to each other. Who asks for what is not there gives way to the others.
constexpr u32 absent = 0xffffffffu;
static bool is_absent(const float* from) { return read_as<u32>(from) == absent; }
static bool is_handed(const float4& v) { return !is_absent(&v.x) && !is_absent(&v.y) && !is_absent(&v.z) && !is_absent(&v.w); }
static void hand_over(float4* to, float4 v) {
    if (!is_absent(&to->x)) host::stop("a number handed over where another one still lies");
    for (float* x : {&v.x, &v.y, &v.z, &v.w})
        if (is_absent(x)) *x = NAN;
    *to = v, host::handed++;
}
static float4 load_handed(const float4* from) {
    if (!is_handed(*from)) host::others.arrived++, host::give_way(host::others);
    return *from;
}
static void take_back(float4* from) { std::memset(from, 0xff, sizeof *from); }
static u32 arrive(u32* counter, u32 limit) {
    const u32 old = *counter;
    *counter = old >= limit ? 0 : old + 1;
    return old;
}

// Launches run one behind the other; that no thread block forgets the wait is checked when all have run.
static void await_producers() { host::awaiting_blocks.insert({blockIdx.x, blockIdx.y}); }
static void release_dependents() {}
static void prefetch_line(const void*) {}

static float infinity() { return INFINITY; }
static float __int_as_float(int x) { return read_as<float>(&x); }
static float __uint_as_float(u32 x) { return read_as<float>(&x); }
static int __float_as_int(float x) { return read_as<int>(&x); }
static u32 __float_as_uint(float x) { return read_as<u32>(&x); }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __fsqrt_rn(float x) { return std::sqrt(x); }
static float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static float __fdividef(float a, float b) { return a / b; }
static float __frsqrt_rn(float x) { return float(1 / std::sqrt(double(x))); }
static int __float2int_rn(float x) { return int(std::nearbyint(x)); }
static float exp2_fast(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0 : y;
}

static float inverse_fast(float x) { return 1 / x; }

static u32 in_register(u32 x) { return x; }

// Byte n of the result is the byte of b:a that nibble n of the selector names; its top bit asks for copies of the sign.
static u32 permute_bytes(u32 a, u32 b, u32 selector) {
    const u64 bytes = u64(b) << 32 | a;
    u32 result = 0;
    for (int n = 0; n < 4; n++) {
        const u32 name = selector >> 4 * n, byte = bytes >> 8 * (name & 7) & 0xff;
        result |= (name & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << 8 * n;
    }
    return result;
}

static float low_bfloat(u32 pair) { return pair <<= 16, read_as<float>(&pair); }
static float high_bfloat(u32 pair) { return pair &= 0xffff0000u, read_as<float>(&pair); }
static float low_half(u32 pair) { return float(read_as<_Float16>(&pair)); }
static float high_half(u32 pair) { return pair >>= 16, low_half(pair); }
static float from_half(u32 bits) { return low_half(bits); }
// To nearest, ties to even; NaN becomes the one that the card's conversions give.
template <bool bfloat16>
static u32 round_16(float x) {
    if (x != x) return 0x7fff;
    if constexpr (bfloat16) {
        const u32 word = read_as<u32>(&x);
        return (word + 0x7fff + (word >> 16 & 1)) >> 16;
    } else {
        const _Float16 half = x;
        return read_as<u16>(&half);
    }
}
template <bool bfloat16>
static u32 pack(float low, float high) { return round_16<bfloat16>(low) | round_16<bfloat16>(high) << 16; }

// Sums and products of two halves are exact in double, so that they are rounded once.
static u32 halves(double low, double high) {
    const _Float16 pair[2] = {_Float16(low), _Float16(high)};
    return read_as<u32>(pair);
}
static u32 fma_halves(u32 a, u32 b, u32 c) {
    return halves(double(low_half(a)) * low_half(b) + low_half(c), double(high_half(a)) * high_half(b) + high_half(c));
}
static u32 fma_halves_relu(u32 a, u32 b, u32 c) {
    return halves(std::max(0.0, double(low_half(a)) * low_half(b) + low_half(c)),
                  std::max(0.0, double(high_half(a)) * high_half(b) + high_half(c)));
}
static u32 choose_bits(u32 a, u32 b, u32 mask) { return a & mask | b & ~mask; }
static u32 multiply_halves(u32 a, u32 b) {
    return halves(double(low_half(a)) * low_half(b), double(high_half(a)) * high_half(b));
}
static u32 multiply_bfloats(u32 a, u32 b) {
    return pack<true>(low_bfloat(a) * low_bfloat(b), high_bfloat(a) * high_bfloat(b));
}

static float not_a_number() { return NAN; }
static float min_or_nan(float a, float b) { return a != a || a < b ? a : b; }
static float max_or_nan(float a, float b) { return a != a || a > b ? a : b; }

// The nearest of all e4m3 numbers, the even code of two that are as near.
constexpr bool converts_e4m3 = __CUDA_ARCH__ >= 890;
static u32 e4m3_code(float x) {
    if (x != x) return 0x7f;
    u32 best = 0;
    double least = INFINITY;
    for (u32 code = 0; code < 0x7f; code++) {
        const int exponent = code >> 3;
        const double size = std::ldexp(exponent ? 8 + code % 8 : code % 8, (exponent ? exponent : 1) - 10);
        const double away = std::abs(size - std::abs(double(x)));
        if (away < least || (away == least && code % 2 == 0)) best = code, least = away;
    }
    return best | (std::signbit(x) ? 0x80 : 0);
}
static u32 e4m3_pair(float low, float high) { return e4m3_code(low) | e4m3_code(high) << 8; }

// Fibers give way at barriers alone: what is plain is atomic.
template <class T>
static T atomicAdd(T* to, T x) { return std::exchange(*to, *to + x); }
static int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static int __ffs(int x) { return __builtin_ffs(x); }
static u64 __umul64hi(u64 a, u64 b) { return (unsigned __int128)a * b >> 64; }
static u64 __double2ull_rn(double x) { return u64(std::nearbyint(x)); }
static float __double2float_rn(double x) { return float(x); }
static double __dmul_rn(double a, double b) { return a * b; }
static double __dadd_rn(double a, double b) { return a + b; }
