// One pass over a step's q, k and v: norm and rope q and k, write q, and write k and v into the arena's blocks,
// as they are or in codes. Where they are coded, q and k are rotated before (quant/rotation.py), and in some formats v.
// Eight elements of a head a thread; a row's heads share its cosines and sines.
//
// Everything between the 16-bit inputs and what is stored is float32: k is not rounded to 16 bit before it is coded.
#include "elements.cuh"
#include "quantize.cuh"
#include "rotation.cuh"

constexpr int heads = HEADS;
constexpr int half_turned = HALF;  // element i < HALF is turned with element i + HALF; those from 2 * HALF on are not
constexpr bool norms = NORMS;

constexpr int threads = 128;
constexpr int passes = PASSES;  // heads that a thread takes, all asked for at once
constexpr int used_lanes = head_dim / 8;
constexpr int lanes = used_lanes <= 8 ? 8 : used_lanes <= 16 ? 16 : 32;  // of a head
constexpr int heads_a_pass = threads / lanes;
constexpr int all_heads = heads + 2 * kv_heads;
static_assert(head_dim % 8 == 0 && used_lanes <= 32 && half_turned % 8 == 0 && 2 * half_turned <= head_dim);

// Eight elements of row `row` (kv head * 64 + token) of a block, from element d of the head on; stored where `mine`.
DEVICE void store(const float (&x)[8], u8* block, const Side& side, int row, int d, bool mine) {
    if constexpr (bits == 16) {
        if (mine) *reinterpret_cast<uint4*>(block + side.codes + (row * head_dim + d) * 2) = narrow(x);
    } else {
        const Coded coded = quantize(x);
        store_codes(coded.codes, block + side.codes + row * (head_dim * bits / 8), d, mine);
        if (!mine || d % group) return;
        const int n = row * (head_dim / group) + d / group;
        using Stored = typename StoredScale<scale_kind>::type;
        reinterpret_cast<Stored*>(block + side.scales)[n] = coded.scale;
        if constexpr (levels == Levels::steps) reinterpret_cast<Stored*>(block + side.biases)[n] = coded.bias;
    }
}

DEVICE void load_floats(float (&x)[8], const float* from) {
    const float4 a = __ldg(reinterpret_cast<const float4*>(from)), b = __ldg(reinterpret_cast<const float4*>(from + 4));
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// grid: (groups of heads, rows). slots: -1: the row is passed over. cos, sin: [context, HALF]. cache: one layer of the
// arena.
extern "C" __global__ void __launch_bounds__(threads)
rope_append(const u16* qkv, const int* positions, const int* slots, const float* cos, const float* sin,
            const float* q_norm, const float* k_norm, float eps, u8* cache, u16* q) {
    const int row = blockIdx.y, lane = threadIdx.x % lanes, d = 8 * lane;
    const bool inside = lane < used_lanes, turned = inside && d < 2 * half_turned, first_half = d < half_turned;
    release_dependents();
    int slot, position;
    const auto angles = [&] { return (u64)position * half_turned + (first_half ? d : d - half_turned); };
    if constexpr (passes == 1) {  // few rows: latency is what they take
        slot = load_fresh(slots + row), position = load_fresh(positions + row);
        if (turned && threadIdx.x < lanes) prefetch_line(cos + angles()), prefetch_line(sin + angles());
        await_producers();
    } else {  // of many, most find their row's in the first-level cache
        await_producers();
        slot = slots[row], position = positions[row];
    }
    if (slot < 0) return;  // a row that is nobody's
    u8* const block = cache + (u64)(slot / block_tokens) * block_bytes;
    const int partner = first_half ? half_turned / 8 : -half_turned / 8;  // lanes from here

    uint4 word[passes];
    int head[passes];
#pragma unroll
    for (int i = 0; i < passes; i++) {
        head[i] = (blockIdx.x * passes + i) * heads_a_pass + threadIdx.x / lanes;
        word[i] = {0, 0, 0, 0};
        if (inside && head[i] < all_heads)
            word[i] = *reinterpret_cast<const uint4*>(qkv + ((u64)row * all_heads + head[i]) * head_dim + d);
    }
    float c[8], s[8];
    if (turned) {
        load_floats(c, cos + angles());
        load_floats(s, sin + angles());
    }
#pragma unroll
    for (int i = 0; i < passes; i++) {
        const bool is_query = head[i] < heads, is_key = !is_query && head[i] < heads + kv_heads;
        const bool present = inside && head[i] < all_heads;
        const u32 from = (threadIdx.x % 32 + partner) & 31;
        const uint4 other = {__shfl_sync(every_lane, word[i].x, from), __shfl_sync(every_lane, word[i].y, from),
                             __shfl_sync(every_lane, word[i].z, from), __shfl_sync(every_lane, word[i].w, from)};
        float x[8], y[8];
        widen(x, word[i]);
        widen(y, other);
        if constexpr (norms) {
            float square = 0;
#pragma unroll
            for (int k = 0; k < 8; k++) square += x[k] * x[k];
#pragma unroll
            for (int step = 1; step < lanes; step *= 2) square += __shfl_xor_sync(every_lane, square, step);
            if (present && (is_query || is_key)) {
                const float factor = __frsqrt_rn(square / head_dim + eps);
                const float* weight = (is_query ? q_norm : k_norm) + d;
                float w[8];
                load_floats(w, weight);
#pragma unroll
                for (int k = 0; k < 8; k++) x[k] = x[k] * factor * w[k];
                if (turned) {
                    load_floats(w, weight + 8 * partner);
#pragma unroll
                    for (int k = 0; k < 8; k++) y[k] = y[k] * factor * w[k];
                }
            }
        }
        if (turned && (is_query || is_key)) {
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const float along = multiply_exactly(x[k], c[k]), across = multiply_exactly(y[k], s[k]);
                x[k] = first_half ? __fsub_rn(along, across) : __fadd_rn(along, across);
            }
        }
        if constexpr (bits != 16) {
            const bool rotated = rotates_values || is_query || is_key;
            if (rotates_values || __any_sync(every_lane, rotated)) rotate<run>(x, rotated);
        }
        if (present && is_query) *reinterpret_cast<uint4*>(q + ((u64)row * heads + head[i]) * head_dim + d) = narrow(x);

        const bool stored = present && !is_query;
        if (!__any_sync(every_lane, stored)) continue;
        const int kv_head = head[i] - heads - (is_key ? 0 : kv_heads);
        store(x, block, is_key ? k_side : v_side, kv_head * block_tokens + slot % block_tokens, d, stored);
    }
}
