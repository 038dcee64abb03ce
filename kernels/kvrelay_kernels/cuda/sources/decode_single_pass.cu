// Decode attention in a single pass: a KV head of a sequence belongs to one thread block, or to a cluster of them.
//
// The arithmetic of a warp is that of decode_attention.cu. There is no plan, no piece and no partial result in memory:
// the thread blocks of a cluster share a head's blocks evenly, and meet in each other's shared memory. For batches whose
// heads fill the multiprocessors by themselves: short sequences, or few and equally long ones.
#include "decode_merge.cuh"

constexpr int cluster = CLUSTER;  // thread blocks that share a head
constexpr int stats_at = flag_at + 16;
#if CLUSTER > 1
#define TOGETHER __cluster_dims__(CLUSTER, 1, 1)
#else
#define TOGETHER
#endif

extern __shared__ __align__(1024) u8 memory[];

// This thread block's sums are added up where its first warp left them; then each takes a slice of the head from all.
template <class F>
DEVICE void add_blocks(const Meeting& at, F f) {
    float2* stats = reinterpret_cast<float2*>(memory + stats_at);  // [tile_queries]: peak, sum
    add_warps<true>(at, warps, [&](int query, int d, float2 x, float sum) {
        *reinterpret_cast<float2*>(at.area + query * area_pitch + d) = x;
        if (d != 0) return;
        float peak = at.peaks[query];
        for (int w = 1; w < warps; w++) peak = fmaxf(peak, at.peaks[w * query_tile + query]);
        stats[query] = {peak, sum};
    });
    meet_cluster();
    constexpr int all = tile_queries * head_dim / 2, share = (all + cluster - 1) / cluster;
    const int begin = cluster_rank() * share, end = min(begin + share, all);
    for (int n = begin + threadIdx.x; n < end; n += warps * 32) {
        const int query = n / (head_dim / 2), d = n % (head_dim / 2) * 2;
        float2 stat[cluster], y[cluster];
#pragma unroll
        for (int r = 0; r < cluster; r++) {
            stat[r] = load_remote(stats + query, r);
            y[r] = load_remote(reinterpret_cast<const float2*>(at.area + query * area_pitch + d), r);
        }
        float peak = stat[0].x, sum = 0;
        float2 x = {0, 0};
#pragma unroll
        for (int r = 1; r < cluster; r++) peak = fmaxf(peak, stat[r].x);
#pragma unroll
        for (int r = 0; r < cluster; r++) {
            const float factor = exp2_fast(stat[r].x - peak);
            x.x += y[r].x * factor, x.y += y[r].y * factor;
            sum += stat[r].y * factor;
        }
        f(query, d, x, sum);
    }
    part_cluster();  // nobody leaves while others read its memory
}

// Grid: kv heads * query tiles * cluster, sequences. lengths: [sequences], 0 for a slot without tokens.
extern "C" __global__ void TOGETHER __launch_bounds__(warps * 32, 1)
decode_single_pass(const u16* q, const void* map, const u8* cache, int cache_row, const int* tables, const int* lengths,
                   u16* out, int table_stride, float scale_log2, int window) {
    const Arguments a{q,       map,     cache,        cache_row, tables, nullptr, out, nullptr,
                      nullptr, nullptr, table_stride, 0,         coded ? scale_log2 * code_units : scale_log2, window};
    release_dependents();
    if (threadIdx.x == 0) prefetch_map(map);
    const int warp = threadIdx.x / 32, sequence = blockIdx.y, rank = blockIdx.x % cluster;
    const Meeting at{reinterpret_cast<float*>(memory + area_at), reinterpret_cast<float*>(memory + peaks_at),
                     reinterpret_cast<float*>(memory + sums_at)};

    const int length = load_fresh(lengths + sequence);
    const Range seen = visible_blocks(length, rows, window, block_tokens);
    const int count = seen.end - seen.begin, first = seen.begin + count * rank / cluster;
    const int blocks = seen.begin + count * (rank + 1) / cluster - first;
    const Work work(Piece{sequence, int(blockIdx.x) / cluster, length, first, blocks, 0, 1, -1});

    Feed feed(shared_address(memory), warp);
    const bool early = Feed::begins_old(work, warp);
    if (early) feed.begin(a, work, warp);
    await_producers();
    Softmax softmax;
    softmax.fetch(a, work);
    if (!early) feed.begin(a, work, warp);
    softmax.prepare();
    softmax.reset();
    for (int n = warp; n < work.tiles; n += warps) {
        const int key0 = first * block_tokens + n * tile;
        feed.wait(length - key0);
        softmax.attend(a, work, feed.stage(), feed.stage_scales(), key0);
        feed.release(a, work);
    }
    softmax.meet(at.area, at.peaks, at.sums);
    const auto finish = [&](int query, int d, float2 x, float sum) {
        write_pair(a, work, query, d, sum == 0 ? float2{0, 0} : float2{x.x / sum, x.y / sum});
    };
    if constexpr (cluster == 1) add_warps<true>(at, warps, finish);
    else add_blocks(at, finish);
}
