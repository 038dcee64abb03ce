// Split-K decode attention straight on the paged, quantized cache.
//
// Every warp runs alone on tiles of a few tokens: asynchronous copies fill its own ring of stages, matrix instructions
// take the codes as they are (scales and biases stay outside the products), and the warps of a thread block meet only
// at the end of a piece. Heads that lie in several pieces are added up by the last thread block to arrive.
#include "decode_merge.cuh"

extern __shared__ __align__(1024) u8 memory[];

// Slots of partial results: one a range for the piece it begins with, one a head for the first of its pieces.
DEVICE int slot_of(const Arguments& a, const Piece& p, int piece) {
    return piece == 0 ? a.ranges + p.sequence * kv_heads * query_tiles + p.head
                      : p.first_range + piece;
}

// A head's partial results, gathered into `gather_groups` sums in the area. A warp takes 128 dimensions of every
// gather_groups-th piece and asks for eight pieces at once: what it waits for is latency.
constexpr int vectors = (tile_queries * head_dim + 127) / 128;
constexpr int gather_groups = vectors < warps ? warps / vectors : 1;
DEVICE void gather(const Arguments& a, const Piece& p, const Meeting& at) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int group = vectors < warps ? warp / vectors : 0;
    if (group >= gather_groups) return;
    for (int v = vectors < warps ? warp % vectors : warp; v < vectors; v += warps) {
        const int n = 4 * (v * 32 + lane), query = n / head_dim, d = n % head_dim;
        if (query >= tile_queries) continue;
        float4 x = {0, 0, 0, 0};
        float peak = -1e30f, sum = 0;
        for (int first = group; first < p.pieces; first += 8 * gather_groups) {
            float2 stat[8];
            float4 y[8];
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const int piece = first + k * gather_groups;
                const int slot = slot_of(a, p, piece < p.pieces ? piece : first);
                stat[k] = load_fresh(a.stats + slot * tile_queries + query);
                y[k] = load_fresh(reinterpret_cast<const float4*>(a.partials + (u64)slot * tile_queries * head_dim + n));
            }
            float higher = peak;
#pragma unroll
            for (int k = 0; k < 8; k++) {
                if (first + k * gather_groups >= p.pieces) stat[k] = {-1e30f, 0};
                higher = fmaxf(higher, stat[k].x);
            }
            const float keep = exp2_fast(peak - higher);
            x.x *= keep, x.y *= keep, x.z *= keep, x.w *= keep, sum *= keep;
            peak = higher;
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const float add = exp2_fast(stat[k].x - higher);
                x.x += y[k].x * add, x.y += y[k].y * add, x.z += y[k].z * add, x.w += y[k].w * add;
                sum += stat[k].y * add;
            }
        }
        *reinterpret_cast<float4*>(at.area + (group * tile_queries + query) * area_pitch + d) = x;
        if (d == 0) at.peaks[group * query_tile + query] = peak, at.sums[group * query_tile + query] = sum;
    }
}

// Slots without tokens answer zeros. A whole warp does it: few places of the plan are to be asked for by all.
DEVICE void answer_empty(const Arguments& a, int sequences) {
    constexpr int words = rows * kv_heads * heads_per_kv * head_dim / 2;
    const int* list = reinterpret_cast<const int*>(a.plan + 1) + 8 * (a.ranges + sequences * kv_heads * query_tiles);
    const int empty = load_fresh(&a.plan->empty);
    for (int i = blockIdx.x; i < empty; i += a.ranges) {
        u32* to = reinterpret_cast<u32*>(a.out) + (u64)load_fresh(list + i) * words;
        for (int n = threadIdx.x % 32; n < words; n += 32) to[n] = 0;
    }
}

// The thread block's result for a piece: output if the piece is a whole head, otherwise a partial result.
DEVICE void conclude(const Arguments& a, const Work& s, const Meeting& at) {
    const Piece& p = s.piece;
    const auto finish = [&](int query, int d, float2 x, float sum) {
        write_pair(a, s, query, d, {x.x / sum, x.y / sum});
    };
    if (p.pieces == 1) return add_warps<true>(at, warps, finish);

    const int slot = slot_of(a, p, blockIdx.x - p.first_range);
    add_warps<true>(at, warps, [&](int query, int d, float2 x, float sum) {
        *reinterpret_cast<float2*>(a.partials + ((u64)slot * tile_queries + query) * head_dim + d) = x;
        if (d == 0) {
            float peak = at.peaks[query];
            for (int w = 1; w < warps; w++) peak = fmaxf(peak, at.peaks[w * query_tile + query]);
            a.stats[slot * tile_queries + query] = {peak, sum};
        }
    });
    int& arrived_last = *reinterpret_cast<int*>(memory + flag_at);
    __syncthreads();
    if (threadIdx.x == 0) {
        const u32 pieces = p.pieces;  // the counter starts over with the last arrival
        arrived_last = arrive(a.arrivals + p.sequence * kv_heads * query_tiles + p.head, pieces - 1) == pieces - 1;
    }
    __syncthreads();
    if (!arrived_last) return;
    gather(a, p, at);
    __syncthreads();
    add_warps<false>(at, min(gather_groups, p.pieces), finish);
    __syncthreads();  // before the next piece's peaks
}

// plan_ahead: whether the plan was made since the last launch that read it, maybe by the kernel ahead.
extern "C" __global__ void __launch_bounds__(warps * 32, BLOCKS_PER_SM)
decode_attention(const u16* q, const void* map, const u8* cache, int cache_row, const int* tables, const Header* plan, u16* out, float* partials,
                 float2* stats, u32* arrivals, int table_stride, int sequences, float scale_log2,
                 int window, int plan_ahead) {
    const Arguments a{q,     map,      cache,        cache_row,  tables, plan, out, partials,
                      stats, arrivals, table_stride, int(gridDim.x), coded ? scale_log2 * code_units : scale_log2, window};
    if (threadIdx.x == 0) prefetch_map(map);
    const int warp = threadIdx.x / 32;
    const Meeting at{reinterpret_cast<float*>(memory + area_at), reinterpret_cast<float*>(memory + peaks_at),
                     reinterpret_cast<float*>(memory + sums_at)};

    if (plan_ahead) await_producers();
    Piece piece = load_piece(plan, blockIdx.x);
    // A range may begin with nothing but the cost of beginning its next head.
    if (piece.blocks == 0 && piece.next >= 0) piece = load_piece(plan, piece.next);
    Work work(piece);
    Feed feed(shared_address(memory), warp);
    const bool early = Feed::begins_old(work, warp);
    if (early) feed.begin(a, work, warp);
    if constexpr (Code::tabled) Code::fill(shared_address(memory) + table_at, warps * 32), __syncthreads();
    await_producers();
    release_dependents();  // only now: kernels behind may read the plan before their wait
    if (warp == warps - 1) answer_empty(a, sequences);
    if (piece.blocks == 0) return;

    Softmax softmax(shared_address(memory));
    softmax.fetch(a, work);
    if (!early) feed.begin(a, work, warp);
    softmax.prepare();
    while (true) {
        softmax.reset();
        for (int n = warp; n < work.tiles; n += warps) {
            const int key0 = work.piece.first_block * block_tokens + n * tile;
            feed.wait(work.piece.length - key0);
            if (n >= warps) feed.advance(a, work);
            softmax.attend(a, work, feed.stage(), feed.stage_scales(), key0);
            feed.release();
        }
        __syncwarp();
        const Work done = work;
        const bool more = work.piece.next >= 0;
        if (more) {
            work = Work(load_piece(plan, work.piece.next));
            feed.begin(a, work, warp);
        }
        softmax.meet(at.area, at.peaks, at.sums);
        if (more) softmax.fetch(a, work);
        conclude(a, done, at);
        if (!more) return;
        softmax.prepare();
    }
}
