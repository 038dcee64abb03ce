// How the warps of a thread block put their sums together, and how a result is written.
#pragma once
#include "decode_softmax.cuh"

struct Meeting {
    float* area;   // [warps, tile_queries, area_pitch]
    float* peaks;  // [warps, query_tile]
    float* sums;   // [warps, query_tile]
};

DEVICE void write_pair(const Arguments& a, const Work& s, int query, int d, float2 x) {
    const int n = s.first_query + query;
    if (n >= queries) return;
    const u64 row = (u64)s.piece.sequence * rows + n / heads_per_kv;
    u16* to = a.out + ((row * kv_heads + s.head) * heads_per_kv + n % heads_per_kv) * head_dim + d;
    *reinterpret_cast<u32*>(to) = pack<bfloat>(x.x, x.y);
}

// What the warps have left in the area, added: f(query, dimension, values of two dimensions, sum of probabilities).
template <bool same_peak, class F>
DEVICE void add_warps(const Meeting& at, int count, F f) {
    for (int n = threadIdx.x; n < tile_queries * head_dim / 2; n += warps * 32) {
        const int query = n / (head_dim / 2), d = n % (head_dim / 2) * 2;
        float peak = -1e30f, sum = 0;
        float2 x = {0, 0};
        if constexpr (!same_peak)
            for (int w = 0; w < count; w++) peak = fmaxf(peak, at.peaks[w * query_tile + query]);
#pragma unroll
        for (int w = 0; w < warps; w++) {
            if (!same_peak && w >= count) break;
            const float factor = same_peak ? 1 : exp2_fast(at.peaks[w * query_tile + query] - peak);
            const float2 y = *reinterpret_cast<const float2*>(at.area + (w * tile_queries + query) * area_pitch + d);
            x.x += y.x * factor, x.y += y.y * factor;
            sum += at.sums[w * query_tile + query] * factor;
        }
        f(query, d, x, sum);
    }
}
