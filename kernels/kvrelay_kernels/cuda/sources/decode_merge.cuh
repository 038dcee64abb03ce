// How the warps of a thread block put their sums together, and how a result is written.
#pragma once
#include "decode_softmax.cuh"

struct Meeting {
    float* area;   // [warps, tile_queries, area_pitch]
    float* peaks;  // [warps, query_tile]
    float* sums;   // [warps, query_tile]
};

// Rows are the queries of a thread block's heads, `tile_queries` of each.
constexpr int block_rows = side * tile_queries, all_pairs = block_rows * head_dim / 2;

DEVICE void write_pair(const Arguments& a, const Work& s, int row, int d, float2 x) {
    const int n = s.first_query + row % tile_queries, head = s.first_head + row / tile_queries;
    if (n >= queries) return;
    const u64 token = (u64)s.piece.sequence * rows + n / heads_per_kv;
    u16* to = a.out + ((token * kv_heads + head) * heads_per_kv + n % heads_per_kv) * head_dim + d;
    *reinterpret_cast<u32*>(to) = pack<bfloat>(x.x, x.y);
}

DEVICE float highest_peak(const Meeting& at, int row) {
    const float* peaks = at.peaks + row / tile_queries * team * query_tile + row % tile_queries;
    float peak = peaks[0];
#pragma unroll
    for (int w = 1; w < team; w++) peak = fmaxf(peak, peaks[w * query_tile]);
    return peak;
}

// What the warps of each head have left in the area, added: f(row, dimension, values of two dimensions, sum of
// probabilities).
template <class F>
DEVICE void add_warps(const Meeting& at, F f) {
    for (int n = threadIdx.x; n < all_pairs; n += warps * 32) {
        const int row = n / (head_dim / 2), d = n % (head_dim / 2) * 2, query = row % tile_queries;
        const int first = row / tile_queries * team;
        float sum = 0;
        float2 x = {0, 0};
#pragma unroll
        for (int w = first; w < first + team; w++) {
            const float2 y = *reinterpret_cast<const float2*>(at.area + (w * tile_queries + query) * area_pitch + d);
            x.x += y.x, x.y += y.y;
            sum += at.sums[w * query_tile + query];
        }
        f(row, d, x, sum);
    }
}
