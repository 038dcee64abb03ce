// Split-K decode attention straight on the paged, quantized cache.
//
// Every warp runs alone on tiles of a few tokens: asynchronous copies fill its own ring of stages, matrix instructions
// take the codes as they are (scales and biases stay outside the products), and the warps of a thread block meet only
// at the end of a piece. Heads that lie in several pieces are added up by the last thread block to arrive.
#include "decode_softmax.cuh"

extern __shared__ __align__(1024) u8 memory[];

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

// Slots of partial results: one a range for the pieces it begins with, one a head for the first of its pieces.
DEVICE int slot_of(const Arguments& a, const Piece& p, int piece) {
    return piece == 0 ? a.max_ranges + p.sequence * kv_heads * query_tiles + p.head
                      : p.first_range + piece;
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

// A warp's share of a head's partial results: every warps-th of them.
DEVICE void add_partials(const Arguments& a, const Piece& p, const Meeting& at) {
    constexpr int vectors = (tile_queries * head_dim / 4 + 31) / 32;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    float4 x[vectors];
    float peak[vectors], sum[vectors];
#pragma unroll
    for (int i = 0; i < vectors; i++) x[i] = {0, 0, 0, 0}, peak[i] = -1e30f, sum[i] = 0;
#pragma unroll 2
    for (int piece = warp; piece < p.pieces; piece += warps) {
        const int slot = slot_of(a, p, piece);
#pragma unroll
        for (int i = 0; i < vectors; i++) {
            const int n = 4 * (i * 32 + lane);
            if (tile_queries * head_dim % 128 && n >= tile_queries * head_dim) continue;
            const float2 stat = load_fresh(a.stats + slot * tile_queries + n / head_dim);
            const float4 y = load_fresh(reinterpret_cast<const float4*>(a.partials + (u64)slot * tile_queries * head_dim + n));
            const float higher = fmaxf(peak[i], stat.x);
            const float keep = exp2_fast(peak[i] - higher), add = exp2_fast(stat.x - higher);
            x[i].x = x[i].x * keep + y.x * add, x[i].y = x[i].y * keep + y.y * add;
            x[i].z = x[i].z * keep + y.z * add, x[i].w = x[i].w * keep + y.w * add;
            sum[i] = sum[i] * keep + stat.y * add;
            peak[i] = higher;
        }
    }
#pragma unroll
    for (int i = 0; i < vectors; i++) {
        const int n = 4 * (i * 32 + lane), query = n / head_dim, d = n % head_dim;
        if (tile_queries * head_dim % 128 && n >= tile_queries * head_dim) continue;
        *reinterpret_cast<float4*>(at.area + (warp * tile_queries + query) * area_pitch + d) = x[i];
        if (d == 0) at.peaks[warp * query_tile + query] = peak[i], at.sums[warp * query_tile + query] = sum[i];
    }
}

// The thread block's result for a piece: output if the piece is a whole head, otherwise a partial result.
DEVICE void conclude(const Arguments& a, const Work& s, int range, const Meeting& at) {
    const Piece& p = s.piece;
    const auto finish = [&](int query, int d, float2 x, float sum) {
        write_pair(a, s, query, d, {x.x / sum, x.y / sum});
    };
    if (p.pieces == 1) return add_warps<true>(at, warps, finish);

    const int slot = slot_of(a, p, range - p.first_range);
    add_warps<true>(at, warps, [&](int query, int d, float2 x, float sum) {
        *reinterpret_cast<float2*>(a.partials + ((u64)slot * tile_queries + query) * head_dim + d) = x;
        if (d == 0) {
            float peak = at.peaks[query];
            for (int w = 1; w < warps; w++) peak = fmaxf(peak, at.peaks[w * query_tile + query]);
            a.stats[slot * tile_queries + query] = {peak, sum};
        }
    });
    int& arrived_last = *reinterpret_cast<int*>(memory + claim_at + 8);
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        const u32 pieces = p.pieces;  // the counter starts over with the last arrival
        arrived_last = atomicInc(a.arrivals + 1 + p.sequence * kv_heads * query_tiles + p.head,
                                 pieces - 1) == pieces - 1;
        __threadfence();
    }
    __syncthreads();
    if (!arrived_last) return;
    add_partials(a, p, at);
    __syncthreads();
    add_warps<false>(at, min(warps, p.pieces), finish);
}

extern "C" __global__ void __launch_bounds__(warps * 32, BLOCKS_PER_SM)
decode_attention(const u16* q, const void* map, const u8* cache, int cache_row, const int* tables, const Header* plan, u16* out, float* partials,
                 float2* stats, u32* arrivals, int table_stride, int max_ranges, int sequences, float scale_log2,
                 int window) {
    const Arguments a{q,     map,      cache,        cache_row,  tables, plan, out, partials,
                      stats, arrivals, table_stride, max_ranges, coded ? scale_log2 * code_units : scale_log2, window};
    if (threadIdx.x == 0) prefetch_map(map);
    const int warp = threadIdx.x / 32, blocks = gridDim.x;
    const Meeting at{reinterpret_cast<float*>(memory + area_at), reinterpret_cast<float*>(memory + peaks_at),
                     reinterpret_cast<float*>(memory + sums_at)};
    int* claim = reinterpret_cast<int*>(memory + claim_at);

    Piece piece = load_piece(plan, blockIdx.x);
    const int small_ranges = __ldg(&plan->small_ranges), empty = __ldg(&plan->empty);
    // A slot without tokens answers zeros.
    for (int i = blockIdx.x; i < empty; i += blocks) {
        constexpr int words = rows * kv_heads * heads_per_kv * head_dim / 2;
        const int* list = reinterpret_cast<const int*>(plan + 1) + 8 * (max_ranges + sequences * kv_heads * query_tiles);
        for (int n = threadIdx.x; n < words; n += warps * 32)
            reinterpret_cast<u32*>(out)[(u64)list[i] * words + n] = 0;
    }
    if (piece.blocks == 0) return;

    // Ranges: the one in work, the next one, and the one after that, which is claimed while the first is in work.
    int range = blockIdx.x, next_range = small_ranges ? range + blocks : -1;
    Feed feed(shared_address(memory), warp);
    Softmax softmax;
    Work work(piece);
    softmax.fetch(a, work);
    feed.begin(a, work, warp);
    softmax.prepare();
    for (int turn = 0;; turn ^= 1) {
        softmax.reset();
        const bool last_of_range = work.piece.next < 0;
        const bool more = !last_of_range || next_range >= 0;
        Piece later;
        if (more) later = load_piece(plan, last_of_range ? next_range : work.piece.next);
        int claimed = -1;
        if (threadIdx.x == 0 && last_of_range && next_range >= 0) {
            const int n = atomicInc(a.arrivals, small_ranges + blocks - 1);
            claimed = n < small_ranges ? 2 * blocks + n : -1;
        }
        for (int n = warp; n < work.tiles; n += warps) {
            const int key0 = work.piece.first_block * block_tokens + n * tile;
            feed.wait(work.piece.length - key0);
            feed.advance(a, work);
            softmax.attend(a, work, feed.stage(), feed.stage_scales(), key0);
            feed.release();
        }
        __syncwarp();
        const Work done = work;
        const int done_range = range;
        if (more) {
            work = Work(later);
            feed.begin(a, work, warp);
        }
        if (threadIdx.x == 0) claim[turn] = claimed;
        softmax.meet(at.area, at.peaks, at.sums);
        if (last_of_range) range = next_range, next_range = claim[turn];
        if (more) softmax.fetch(a, work);
        conclude(a, done, done_range, at);
        if (!more) return;
        softmax.prepare();
    }
}
