// The queries of one warp, as operands of the matrix instruction.
#pragma once
#include "decode_feed.cuh"

// A lane (g = lane / 4, t = lane % 4) holds a fourth of the elements of query g (and g + 8), but the sums of 2t and 2t + 1
// (and 8 more).
struct Queries {
    u32 q[steps][2 * query_halves];
    float q_sum[query_halves][groups][2];  // over each group's elements, where codes have biases

    DEVICE static u32 pair_of(u32 low, u32 high, u32 selector) {
        const u32 pair = permute_bytes(low, high, selector);
        if constexpr (bfloat && coded) return pack<false>(low_bfloat(pair), high_bfloat(pair));
        else return pair;
    }

    // Queries as they lie in memory; they are needed only once the first keys are there.
    DEVICE void fetch(const Arguments& a, const Work& s) {
        const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int m = 0; m < query_halves; m++) {
            const int n = s.first_query + g + 8 * m;
            const u64 row = (u64)s.piece.sequence * rows + n / heads_per_kv;
            const u32* from = reinterpret_cast<const u32*>(
                a.q + ((row * kv_heads + s.head) * heads_per_kv + n % heads_per_kv) * head_dim);
#pragma unroll
            for (int i = 0; i < steps; i++) q[i][m] = q[i][query_halves + m] = 0;
            if (n >= queries) continue;
#pragma unroll
            for (int i = 0; i < steps; i++) {
                if constexpr (width == 16) {
                    q[i][m] = load_near(from + 8 * i + t);
                    q[i][query_halves + m] = load_near(from + 8 * i + 4 + t);
                } else if constexpr (width == 8) {
                    const uint2 w = load_near(reinterpret_cast<const uint2*>(from) + 4 * i + t);
                    q[i][m] = w.x, q[i][query_halves + m] = w.y;
                } else if (i % 2 == 0) {
                    const uint4 w = load_near(reinterpret_cast<const uint4*>(from) + 2 * i + t);
                    q[i][m] = w.x, q[i][query_halves + m] = w.y, q[i + 1][m] = w.z, q[i + 1][query_halves + m] = w.w;
                }
            }
        }
    }

    // In the order of dimensions that TabledCodes::keys() gives, as halves where keys are codes.
    DEVICE void prepare() {
        if constexpr (!coded) return;
#pragma unroll
        for (int m = 0; m < query_halves; m++) {
#pragma unroll
            for (int i = 0; i < steps; i++) {
                u32& even = q[i][m];
                u32& odd = q[i][query_halves + m];
                if constexpr (width == 8) {
                    const u32 x = even, y = odd;
                    even = pair_of(x, y, 0x5410), odd = pair_of(x, y, 0x7632);
                } else if constexpr (Code::tabled) {
                    if (bfloat) even = pack<false>(low_bfloat(even), high_bfloat(even)), odd = pack<false>(low_bfloat(odd), high_bfloat(odd));
                } else if (i % 2 == 0) {
                    u32& next_even = q[i + 1][m];
                    u32& next_odd = q[i + 1][query_halves + m];
                    const u32 x = even, y = odd, z = next_even, w = next_odd;
                    even = pair_of(x, z, 0x5410), odd = pair_of(x, z, 0x7632);
                    next_even = pair_of(y, w, 0x5410), next_odd = pair_of(y, w, 0x7632);
                    if constexpr (uneven) odd = multiply_halves(odd, half_4), next_odd = multiply_halves(next_odd, half_4);
                }
            }
            if constexpr (!affine) continue;
#pragma unroll
            for (int i = 0; i < groups; i++) {
                float x = 0;
#pragma unroll
                for (int j = i * group / 16; j < (i + 1) * group / 16; j++) {
                    const float odd = low_half(q[j][query_halves + m]) + high_half(q[j][query_halves + m]);
                    x += low_half(q[j][m]) + high_half(q[j][m]) + odd * (code_units / odd_pair_units);
                }
                x += __shfl_xor_sync(every_lane, x, 1);
                x = (x + __shfl_xor_sync(every_lane, x, 2)) / code_units;
                const int t = threadIdx.x & 3;
                q_sum[m][i][0] = __shfl_sync(every_lane, x, 8 * t), q_sum[m][i][1] = __shfl_sync(every_lane, x, 8 * t + 4);
            }
        }
    }
};
