// Decode attention in a single pass: a KV head of a sequence belongs to one thread block, or to a cluster of them.
//
// The arithmetic of a warp is that of decode_attention.cu. There is no plan, no piece and no partial result in memory:
// the thread blocks of a cluster share a head's blocks evenly, and meet in each other's shared memory. For batches whose
// heads fill the multiprocessors by themselves: short sequences, or few and equally long ones.
#include "decode_merge.cuh"

constexpr int cluster = CLUSTER;  // thread blocks that share a head
#if CLUSTER > 1
#define TOGETHER __cluster_dims__(CLUSTER, 1, 1)
#else
#define TOGETHER
#endif

extern __shared__ __align__(1024) u8 memory[];

// Each thread block of a cluster answers for a slice of the head: what the others have of it comes into its inbox.
constexpr int slice = (all_pairs + cluster - 1) / cluster;
constexpr int inbox_at = table_at + (Code::tabled ? table_bytes : 0);  // [cluster, slice]: pairs of dimensions
constexpr int peaks_of_all_at = inbox_at + cluster * slice * 8;        // [cluster, tile_queries]: peak, sum
constexpr int pushed_at = peaks_of_all_at + cluster * tile_queries * 8;

static_assert(side == 1 && cluster <= head_dim / 2);

DEVICE void open_inbox(u32 memory, int rank) {
    const int pairs = max(0, min(slice, all_pairs - rank * slice)) + tile_queries;
    if (threadIdx.x == 0) {
        create_barrier(memory + pushed_at);
        publish_barriers();
        expect_bytes(memory + pushed_at, cluster * pairs * 8);
    }
    __syncwarp();
    arrive_in_cluster();
}

// This thread block's sums, added up and sent out; then its slice of the head, from all that have come.
template <class F>
DEVICE void add_blocks(const Meeting& at, int rank, F f) {
    float2* inbox = reinterpret_cast<float2*>(memory + inbox_at);
    float2* stats = reinterpret_cast<float2*>(memory + peaks_of_all_at);
    const u32 pushed = shared_address(memory) + pushed_at;
    wait_for_cluster();  // all inboxes are open
    add_warps(at, [&](int query, int d, float2 x, float sum) {
        const int n = (query * head_dim + d) / 2, owner = n / slice;
        push(inbox + rank * slice + n - owner * slice, x, pushed, owner);
        if (d / 2 >= cluster) return;
        push(stats + rank * tile_queries + query, {highest_peak(at, query), sum}, pushed, d / 2);
    });
    wait_pushed(pushed, 0);
    for (int n = threadIdx.x; n < slice; n += warps * 32) {
        const int pair = rank * slice + n, query = pair / (head_dim / 2), d = pair % (head_dim / 2) * 2;
        if (pair >= all_pairs) break;
        float peak = -1e30f, sum = 0;
        float2 x = {0, 0};
#pragma unroll
        for (int r = 0; r < cluster; r++) peak = fmaxf(peak, stats[r * tile_queries + query].x);
#pragma unroll
        for (int r = 0; r < cluster; r++) {
            const float2 stat = stats[r * tile_queries + query], y = inbox[r * slice + n];
            const float factor = exp2_fast(stat.x - peak);
            x.x += y.x * factor, x.y += y.y * factor;
            sum += stat.y * factor;
        }
        f(query, d, x, sum);
    }
}

// Grid: kv heads * query tiles * cluster, sequences. lengths: [sequences], 0 for a slot without tokens.
extern "C" __global__ void TOGETHER __launch_bounds__(warps * 32, 1)
decode_single_pass(const u16* q, const void* map, const u8* cache, int cache_row, const int* tables, const int* lengths,
                   u16* out, int table_stride, float scale_log2, int window) {
    const Arguments a{q,       map,          cache, cache_row, tables, nullptr, out,
                      nullptr, table_stride, 0,     coded ? scale_log2 * code_units : scale_log2, window};
    release_dependents();
    if constexpr (cluster > 1) open_inbox(shared_address(memory), blockIdx.x % cluster);
    if (threadIdx.x == 0) prefetch_map(map);
    const int warp = threadIdx.x / 32, sequence = blockIdx.y, rank = blockIdx.x % cluster;
    const Meeting at{reinterpret_cast<float*>(memory + area_at), reinterpret_cast<float*>(memory + peaks_at),
                     reinterpret_cast<float*>(memory + sums_at)};

    const int length = load_near(lengths + sequence);
    const Range seen = visible_blocks(length, rows, window, block_tokens);
    const int count = seen.end - seen.begin, first = seen.begin + count * rank / cluster;
    const int blocks = seen.begin + count * (rank + 1) / cluster - first;
    const Work work(Piece{sequence, int(blockIdx.x) / cluster, length, first, blocks, 0, 1, -1});

    Feed feed(shared_address(memory), warp);
    const bool early = Feed::begins_old(work, warp);
    if (early) feed.begin(a, work, warp);
    if constexpr (Code::tabled) Code::fill(shared_address(memory) + table_at, warps * 32), __syncthreads();
    await_producers();
    Softmax softmax(shared_address(memory));
    softmax.fetch(a, work);
    if (!early) feed.begin(a, work, warp);
    softmax.prepare();
    softmax.reset();
    for (int n = warp; n < work.tiles; n += warps) {
        const int key0 = first * block_tokens + n * tile;
        feed.wait(length - key0);
        if (n >= warps) feed.advance(a, work);
        softmax.attend(a, work, feed.stage(), feed.stage_scales(), key0);
        feed.release();
    }
    __syncwarp();
    softmax.meet(at.area, at.peaks, at.sums);
    const auto finish = [&](int query, int d, float2 x, float sum) {
        write_pair(a, work, query, d, sum == 0 ? float2{0, 0} : float2{x.x / sum, x.y / sum});
    };
    if constexpr (cluster == 1) add_warps(at, finish);
    else add_blocks(at, rank, finish);
}
