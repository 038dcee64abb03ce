// Split-K decode attention straight on the paged, quantized cache.
//
// Every warp runs alone on tiles of a few tokens: asynchronous copies fill its own ring of stages, matrix instructions
// take the codes as they are (scales and biases stay outside the products), and the warps of a thread block meet only
// at the end of a piece. Heads that lie in several pieces are added up by the thread blocks that have them.
#include "decode_merge.cuh"

extern __shared__ __align__(1024) u8 memory[];

// Where a range leaves what it has of a head: it may end with the first piece of one and begin with the last of another.
DEVICE float4* left_by(const Arguments& a, const Piece& p, int piece) {
    return a.partials + (u64)(2 * (p.first_range + piece) + (piece == 0)) * all_pairs;
}

// Pieces that a thread asks for at once, and lanes that the pieces of one pair are dealt to.
constexpr int asked = 4;
DEVICE int lanes_of(const Piece& p) {
    int lanes = 1;
    while (lanes < 32 && lanes * asked < p.pieces) lanes *= 2;
    return lanes;
}

// Of a head in several pieces, the thread blocks of the first ones add a slice each: as many as can ask for all at once,
// so that most end early, but not that of the last piece. For these it is the end of their range: what they wait for is
// nearly there.
DEVICE int adders_of(const Piece& p) {
    constexpr int threads = warps * 32;
    return min(p.pieces - 1, (all_pairs * lanes_of(p) + threads - 1) / threads);
}

// Sums relative to several peaks, put together: of two dimensions, their peak, and the sum of probabilities.
template <int count>
DEVICE float4 joined(const float4 (&x)[count]) {
    float4 all = {0, 0, x[0].z, 0};
#pragma unroll
    for (int k = 1; k < count; k++) all.z = fmaxf(all.z, x[k].z);
#pragma unroll
    for (int k = 0; k < count; k++) {
        const float factor = exp2_fast(x[k].z - all.z);
        all.x += x[k].x * factor, all.y += x[k].y * factor, all.w += x[k].w * factor;
    }
    return all;
}

DEVICE void add_slice(const Arguments& a, const Work& s, int piece) {
    const Piece& p = s.piece;
    const int adders = adders_of(p), lanes = lanes_of(p);
    const int begin = all_pairs * piece / adders, end = all_pairs * (piece + 1) / adders;
#pragma unroll 1
    for (int first = begin; first < end; first += warps * 32 / lanes) {
        const int n = first + threadIdx.x / lanes;
        float4 all = {0, 0, -1e30f, 0};
#pragma unroll 1
        for (int i = threadIdx.x % lanes; n < end && i < p.pieces; i += asked * lanes) {
            float4 one[asked + 1];
            const auto exists = [&](int k) { return i + k * lanes < p.pieces; };
            // What does not exist is the first one again, which nobody else takes back.
            const auto place = [&](int k) { return left_by(a, p, exists(k) ? i + k * lanes : i) + n; };
            bool handed;
            do {
#pragma unroll
                for (int k = 0; k < asked; k++) one[k] = load_handed(place(k));
                handed = true;
#pragma unroll
                for (int k = 0; k < asked; k++) handed &= is_handed(one[k]);
            } while (!handed);
#pragma unroll
            for (int k = 0; k < asked; k++) {
                take_back(place(k));
                if (!exists(k)) one[k] = {0, 0, -1e30f, 0};
            }
            one[asked] = all;
            all = joined(one);
        }
        for (int step = 1; step < lanes; step *= 2)
            all = joined({all, {__shfl_xor_sync(every_lane, all.x, step), __shfl_xor_sync(every_lane, all.y, step),
                                __shfl_xor_sync(every_lane, all.z, step), __shfl_xor_sync(every_lane, all.w, step)}});
        if (n < end && threadIdx.x % lanes == 0)
            write_pair(a, s, n / (head_dim / 2), n % (head_dim / 2) * 2, {all.x / all.w, all.y / all.w});
    }
}

// Slots without tokens answer zeros. A whole warp does it: few places of the plan are to be asked for by all.
DEVICE void answer_empty(const Arguments& a, int sequences) {
    constexpr int words = rows * kv_heads * heads_per_kv * head_dim / 2;
    const int* list = reinterpret_cast<const int*>(a.plan + 1) + 8 * (a.ranges + sequences * (kv_heads / side) * query_tiles);
    const int empty = load_fresh(&a.plan->empty);
    for (int i = blockIdx.x; i < empty; i += a.ranges) {
        u32* to = reinterpret_cast<u32*>(a.out) + (u64)load_fresh(list + i) * words;
        for (int n = threadIdx.x % 32; n < words; n += 32) to[n] = 0;
    }
}

// The thread block's result for a piece: output if the piece is a whole head, otherwise handed over.
DEVICE void conclude(const Arguments& a, const Work& s, const Meeting& at) {
    const Piece& p = s.piece;
    const int piece = blockIdx.x - p.first_range;
    add_warps(at, [&](int row, int d, float2 x, float sum) {
        if (p.pieces == 1) write_pair(a, s, row, d, {x.x / sum, x.y / sum});
        else hand_over(left_by(a, p, piece) + (row * head_dim + d) / 2, {x.x, x.y, highest_peak(at, row), sum});
    });
    if (p.pieces > 1 && piece < adders_of(p)) add_slice(a, s, piece);
}

// plan_ahead: whether the plan was made since the last launch that read it, maybe by the kernel ahead.
extern "C" __global__ void __launch_bounds__(warps * 32, BLOCKS_PER_SM)
decode_attention(const u16* q, const void* map, const u8* cache, int cache_row, const int* tables, const Header* plan, u16* out, float4* partials,
                 int table_stride, int sequences, float scale_log2, int window, int plan_ahead) {
    const Arguments a{q,        map,          cache,          cache_row, tables, plan, out,
                      partials, table_stride, int(gridDim.x), coded ? scale_log2 * code_units : scale_log2, window};
    if (threadIdx.x == 0) prefetch_map(map);
    const int warp = threadIdx.x / 32, first = warp % team;  // of its head's tiles
    const Meeting at{reinterpret_cast<float*>(memory + area_at), reinterpret_cast<float*>(memory + peaks_at),
                     reinterpret_cast<float*>(memory + sums_at)};

    if (plan_ahead) await_producers();
    Piece piece = load_piece(plan, blockIdx.x);
    // A range may begin with nothing but the cost of beginning its next head.
    if (piece.blocks == 0 && piece.next >= 0) piece = load_piece(plan, piece.next);
    Work work(piece);
    Feed feed(shared_address(memory), warp);
    const bool early = Feed::begins_old(work, first);
    if (early) feed.begin(a, work, first);
    if constexpr (Code::tabled) Code::fill(shared_address(memory) + table_at, warps * 32), __syncthreads();
    await_producers();
    release_dependents();  // only now: kernels behind may read the plan before their wait
    if (warp == warps - 1) answer_empty(a, sequences);
    if (piece.blocks == 0) return;

    Softmax softmax(shared_address(memory));
    softmax.fetch(a, work);
    if (!early) feed.begin(a, work, first);
    softmax.prepare();
    while (true) {
        softmax.reset();
        for (int n = first; n < work.tiles; n += team) {
            const int key0 = work.piece.first_block * block_tokens + n * tile;
            feed.wait(work.piece.length - key0);
            if (n >= team) feed.advance(a, work);
            softmax.attend(a, work, feed.stage(), feed.stage_scales(), key0);
            feed.release();
        }
        __syncwarp();
        const Work done = work;
        const bool more = work.piece.next >= 0;
        if (more) {
            work = Work(load_piece(plan, work.piece.next));
            feed.begin(a, work, first);
        }
        softmax.meet(at.area, at.peaks, at.sums);
        if (more) softmax.fetch(a, work);
        conclude(a, done, at);
        if (!more) return;
        __syncthreads();  // before the next piece's peaks
        softmax.prepare();
    }
}
