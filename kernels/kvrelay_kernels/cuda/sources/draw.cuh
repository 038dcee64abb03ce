// What the kernels that draw tokens share: a sequence's settings, and how logits are ordered, weighed and put in bins.
//
// Weights are whole multiples of 2^-45 of the likeliest token's: sums of them are exact, so that atomics may add them
// in any order. What is 32 temperatures below the likeliest would round to nothing and is never drawn.
#pragma once
#include "primitives.cuh"

constexpr int threads = THREADS, bins = BINS;  // bins: a power of two
constexpr float span = 32;                     // temperatures
constexpr double weight_of_likeliest = 1ull << 45;
constexpr int not_finite = -2;

// As `SETTINGS` in cuda/draw.py.
struct Draw {
    u64 seed;
    double temperature, top_p, min_p, presence, frequency;
    float repetition;
    int top_k;
    int ending_from;  // tokens of prompt and answer from which on it may end
    u32 counted;      // whether its tokens are counted, since a setting needs that
    u32 unused[16];
};
static_assert(sizeof(Draw) == 128);

// A token of the vocabulary, seen from a sequence: these bits, and how often the answer has it.
constexpr u32 in_prompt = 1u << 31, ends_answer = 1u << 30, answer_times = ends_answer - 1;

// Larger for larger values; -0 is 0.
DEVICE u32 rank_of(float x) {
    const u32 bits = __float_as_uint(__fadd_rn(x, 0.0f));
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
DEVICE float of_rank(u32 rank) { return __uint_as_float(rank ^ (rank >> 31 ? 0x80000000u : 0xffffffffu)); }

// The order in which tokens are drawn: the likeliest first (the largest), among equals the lowest index.
DEVICE u64 order_of(float x, int token) { return u64(rank_of(x)) << 32 | ~u32(token); }
DEVICE int token_of(u64 order) { return ~u32(order); }
DEVICE float logit_of(u64 order) { return of_rank(order >> 32); }
constexpr u64 broken = ~0ull;  // the order of no finite logit

// Calls f(i) for this thread's share of the numbers from `begin` to `end`: mostly one, so the code is not repeated.
template <class F>
DEVICE void each_number(int begin, int end, F f) {
#pragma unroll 1
    for (int i = begin + threadIdx.x; i < end; i += threads) f(i);
}

// The first of those that a warp's lanes have.
DEVICE u64 first_of_lanes(u64 first) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) first = max(first, __shfl_xor_sync(every_lane, first, step));
    return first;
}
// The first of a row, of which each piece has its own; `broken` where a logit is not finite. For all lanes of a warp.
DEVICE u64 first_of(const u64* pieces, int count) {
    u64 first = 0;
    for (int i = threadIdx.x % 32; i < count; i += 32) first = max(first, pieces[i]);
    return first_of_lanes(first);
}

// Adds to a sum in shared memory, which adds 32 bits at once: 64 it only compares and swaps, again and again.
DEVICE void add_shared(u64* sum, u64 value) {
    u32* const halves = reinterpret_cast<u32*>(sum);
    const u32 low = value, before = atomicAdd(halves, low), carry = before + low < low;
    if (const u32 high = u32(value >> 32) + carry) atomicAdd(halves + 1, high);
}

// Calls f(token, logit) for this thread's share of the tokens from `begin` to `end`; its loads are under way
// together.
template <class F>
DEVICE void each_token(const float* logits, int begin, int end, F f) {
    constexpr int depth = 8;
    for (int from = begin + threadIdx.x; from < end; from += depth * threads) {
        float x[depth];
#pragma unroll
        for (int i = 0; i < depth; i++) x[i] = logits[min(from + i * threads, end - 1)];
#pragma unroll
        for (int i = 0; i < depth; i++)
            if (from + i * threads < end) f(from + i * threads, x[i]);
    }
}

// Where logits lie among the bins.
struct Scale {
    float peak, bins_per_logit;

    // How far a logit lies behind the likeliest, in bins; never less than a larger logit.
    DEVICE float place(float x) const { return (peak - x) * bins_per_logit; }
    // The bin of a logit, the likeliest's first. From `bins` on: never drawn.
    DEVICE int bin(float x) const { return int(min(float(bins), place(x))); }
    // The rank of a logit at such a place.
    DEVICE u32 rank_at(float place) const { return rank_of(peak - place / bins_per_logit); }
};

struct Weights : Scale {
    double inverse_temperature, min_p;
    u32 lowest_rank;  // lower ones are not among the top k

    DEVICE Weights(const Draw& draw, u64 first)
        : Scale{logit_of(first), float(bins / (span * draw.temperature))}, inverse_temperature(1 / draw.temperature),
          min_p(draw.min_p), lowest_rank(0) {}

    // 0: never drawn. One copy of it: in a step, code comes from far, since all weights of a model have passed since it ran.
    __noinline__ __device__ u64 of(float x) const {
        if (rank_of(x) < lowest_rank) return 0;
        const double weight = exp((double(x) - peak) * inverse_temperature);
        return weight < min_p ? 0 : __double2ull_rn(weight * weight_of_likeliest);
    }
};
