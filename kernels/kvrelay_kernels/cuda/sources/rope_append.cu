// One pass over a step's q, k and v: norm and rope q and k, write q, and write k and v into the arena's blocks,
// as they are or in affine codes; where k is coded, q and k are rotated before (quant/rotation.py). Eight elements of a head a thread; a row's heads share its cosines and sines.
//
// Everything between the 16-bit inputs and what is stored is float32, in the roundings of quant/affine.py: k is not
// rounded to 16 bit before it is quantized.
#include "elements.cuh"

constexpr int heads = HEADS, kv_heads = KV_HEADS, head_dim = HEAD_DIM;
constexpr int half_turned = HALF;  // element i < HALF is turned with element i + HALF; those from 2 * HALF on are not
constexpr int bits = BITS, group = GROUP;  // of stored elements: 16, 8 or 4; elements that share a scale
constexpr bool norms = NORMS;
constexpr int block_tokens = 64, block_bytes = BLOCK_BYTES;
constexpr int k_codes = K_CODES, k_scales = K_SCALES, k_biases = K_BIASES;
constexpr int v_codes = V_CODES, v_scales = V_SCALES, v_biases = V_BIASES;

constexpr int threads = 128;
constexpr int passes = PASSES;  // heads that a thread takes, all asked for at once
constexpr int used_lanes = head_dim / 8;
constexpr int lanes = used_lanes <= 8 ? 8 : used_lanes <= 16 ? 16 : 32;  // of a head
constexpr int heads_a_pass = threads / lanes;
constexpr int all_heads = heads + 2 * kv_heads;
static_assert(head_dim % 8 == 0 && used_lanes <= 32 && half_turned % 8 == 0 && 2 * half_turned <= head_dim);
static_assert(bits == 16 || (head_dim % group == 0 && (group == 32 || group == 64)));

// The Walsh-Hadamard transform of a run of elements: stages within a lane, then between the lanes that share the run.
// Every lane of the warp takes part; x changes where `mine`.
DEVICE void rotate(float (&x)[8], bool mine) {
    constexpr int run = head_dim & -head_dim;
    constexpr int exponent = run == 8 ? 3 : run == 16 ? 4 : run == 32 ? 5 : run == 64 ? 6 : run == 128 ? 7 : 8;
    constexpr float scale = (exponent % 2 ? 0.70710678118654752f : 1.0f) / (1 << exponent / 2);
    float y[8];
#pragma unroll
    for (int k = 0; k < 8; k++) y[k] = x[k];
#pragma unroll
    for (int step = 1; step < 8; step *= 2)
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (!(k & step)) {
                const float a = y[k], b = y[k + step];
                y[k] = __fadd_rn(a, b), y[k + step] = __fsub_rn(a, b);
            }
#pragma unroll
    for (int step = 1; step < run / 8; step *= 2) {
        const bool upper = threadIdx.x & step;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const float other = __shfl_xor_sync(every_lane, y[k], step);
            y[k] = upper ? __fsub_rn(other, y[k]) : __fadd_rn(y[k], other);
        }
    }
    if (!mine) return;
#pragma unroll
    for (int k = 0; k < 8; k++) x[k] = __fmul_rn(y[k], scale);
}

struct Place {
    u8* block;
    int row;  // kv head * 64 + token
};

// Scale, bias and codes of a group, which `group / 8` neighbouring lanes hold; every lane of the warp takes part.
DEVICE void store_coded(const float (&x)[8], const Place& at, bool mine, int codes, int scales, int biases, int d) {
    float low = x[0], high = x[0];
#pragma unroll
    for (int k = 1; k < 8; k++) low = fminf(low, x[k]), high = fmaxf(high, x[k]);
#pragma unroll
    for (int step = 1; step < group / 8; step *= 2) {
        low = fminf(low, __shfl_xor_sync(every_lane, low, step));
        high = fmaxf(high, __shfl_xor_sync(every_lane, high, step));
    }
    if (!mine) return;
    constexpr float top = (1 << bits) - 1;
    const u32 affine = pack<false>(__fdiv_rn(__fsub_rn(high, low), top), low);
    const float scale = low_half(affine), bias = high_half(affine), divisor = scale == 0 ? 1 : scale;
    u32 code[8];
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const float steps = __fdiv_rn(__fsub_rn(x[k], bias), divisor);
        code[k] = scale == 0 ? 0 : __float2int_rn(fminf(fmaxf(steps, 0.0f), top));
    }
    u8* to = at.block + codes + (at.row * head_dim + d) * bits / 8;
    if constexpr (bits == 8) {
        *reinterpret_cast<uint2*>(to) = {code[0] | code[1] << 8 | code[2] << 16 | code[3] << 24,
                                         code[4] | code[5] << 8 | code[6] << 16 | code[7] << 24};
    } else {
        u32 word = 0;
#pragma unroll
        for (int k = 0; k < 8; k++) word |= code[k] << 4 * k;
        *reinterpret_cast<u32*>(to) = word;
    }
    if (d % group == 0) {
        const int n = at.row * (head_dim / group) + d / group;
        reinterpret_cast<u16*>(at.block + scales)[n] = affine & 0xffff;
        reinterpret_cast<u16*>(at.block + biases)[n] = affine >> 16;
    }
}

DEVICE void load_floats(float (&x)[8], const float* from) {
    const float4 a = __ldg(reinterpret_cast<const float4*>(from)), b = __ldg(reinterpret_cast<const float4*>(from + 4));
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// grid: (groups of heads, rows). cos, sin: [context, HALF]. cache: one layer of the arena.
extern "C" __global__ void __launch_bounds__(threads)
rope_append(const u16* qkv, const int* positions, const int* slots, const float* cos, const float* sin,
            const float* q_norm, const float* k_norm, float eps, u8* cache, u16* q) {
    const int row = blockIdx.y, lane = threadIdx.x % lanes, d = 8 * lane;
    const bool inside = lane < used_lanes, turned = inside && d < 2 * half_turned, first_half = d < half_turned;
    const int slot = __ldg(slots + row);
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
        const u64 at = (u64)__ldg(positions + row) * half_turned + (first_half ? d : d - half_turned);
        load_floats(c, cos + at);
        load_floats(s, sin + at);
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
        if constexpr (bits != 16) rotate(x, is_query || is_key);
        if (present && is_query) *reinterpret_cast<uint4*>(q + ((u64)row * heads + head[i]) * head_dim + d) = narrow(x);

        const bool stored = present && !is_query;
        if (!__any_sync(every_lane, stored)) continue;
        const Place at = {block, (head[i] - heads - (is_key ? 0 : kv_heads)) * block_tokens + slot % block_tokens};
        if constexpr (bits == 16) {
            if (stored)
                *reinterpret_cast<uint4*>(block + (is_key ? k_codes : v_codes) + (at.row * head_dim + d) * 2) = narrow(x);
        } else {
            store_coded(x, at, stored, is_key ? k_codes : v_codes, is_key ? k_scales : v_scales,
                        is_key ? k_biases : v_biases, d);
        }
    }
}
