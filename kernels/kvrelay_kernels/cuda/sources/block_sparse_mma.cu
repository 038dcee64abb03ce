// Attention of prompts over the paged 16-bit cache, on any tensor cores from compute capability 8.0 on: tiles of up to
// 128 queries visit the key tiles on their list.
//
// A thread block takes the queries of one head, a warp 16 or 32 of their rows; a step's scores and probabilities stay
// in the warp's registers. Source of the form: FlashAttention-2 (Dao, 2023).
// A row's sums run over its keys in one order, from the last tile to the first, wherever its tile begins.
#include "sparse_ring.cuh"
#include "sparse_softmax.cuh"

extern __shared__ __align__(1024) u8 memory[];

constexpr int fragments = warp_rows / 16;
constexpr int residents = head_dim > 128 ? 1 : 2;  // thread blocks of a multiprocessor

using Scores = float[fragments][step / 2];
using Output = float[fragments][head_dim / 2];
using Probabilities = u32[fragments][step / 4];

// The four accumulators that a thread has of 16 rows by 8 columns, the one `tile` of those beside each other.
template <int n>
DEVICE float (&tile_of(float (&x)[n], int tile))[4] {
    return *reinterpret_cast<float(*)[4]>(x + 4 * tile);
}

// The warp's queries by a step's keys, both where this lane loads them from.
DEVICE void multiply_keys(Scores& s, u32 queries, u32 keys) {
#pragma unroll
    for (int f = 0; f < fragments; f++) {
#pragma unroll
        for (int i = 0; i < step / 2; i++) s[f][i] = 0;
    }
#pragma unroll
    for (int d = 0; d < head_dim / 16; d++) {
        u32 a[fragments][4], b[4];
#pragma unroll
        for (int f = 0; f < fragments; f++) load_matrices(a[f], beside(queries, 2 * d, query_panel) + f * 16 * 128);
#pragma unroll
        for (int n = 0; n < step / 16; n++) {
            load_matrices(b, beside(keys, 2 * d, slot_panel) + n * 16 * 128);
#pragma unroll
            for (int f = 0; f < fragments; f++) {
                multiply<bfloat>(tile_of(s[f], 2 * n), a[f][0], a[f][1], a[f][2], a[f][3], b[0], b[1]);
                multiply<bfloat>(tile_of(s[f], 2 * n + 1), a[f][0], a[f][1], a[f][2], a[f][3], b[2], b[3]);
            }
        }
    }
}

// Adds a step's values, weighted.
DEVICE void multiply_values(Output& o, const Probabilities& p, u32 values) {
#pragma unroll
    for (int n = 0; n < step / 16; n++) {
#pragma unroll
        for (int d = 0; d < head_dim / 16; d++) {
            u32 b[4];
            load_transposed(b, beside(values, 2 * d, slot_panel) + n * 16 * 128);
#pragma unroll
            for (int f = 0; f < fragments; f++) {
                const u32* a = p[f] + 4 * n;
                multiply<bfloat>(tile_of(o[f], 2 * d), a[0], a[1], a[2], a[3], b[0], b[1]);
                multiply<bfloat>(tile_of(o[f], 2 * d + 1), a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
    }
}

// Copies the warp's queries; rows that the item does not have are its last one again.
DEVICE void copy_queries(const Arguments& a, const Item& item, int head, int first) {
    const u8* from = reinterpret_cast<const u8*>(a.q + ((u64)item.row * heads + head) * head_dim);
#pragma unroll 4
    for (int n = threadIdx.x % 32; n < warp_rows * vectors; n += 32) {
        const int row = first + n / vectors, vector = n % vectors;
        const u64 at = (u64)min(row, item.rows - 1) * heads * head_dim * 2 + vector * 16;
        copy16(shared_address(memory) + place(row % rows, vector, query_panel), from + at);
    }
}

// The warp's output: through the place of its queries, to whole vectors.
DEVICE void write_rows(const Arguments& a, const Item& item, int head, int first, const Output& o,
                       const Softmax* softmax) {
    const int lane = threadIdx.x % 32;
    const u32 to = shared_address(memory);
    __syncwarp();
#pragma unroll
    for (int f = 0; f < fragments; f++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float inverse = softmax[f].inverse(r);
            const u32 at = to + place(first % rows + 16 * f + 8 * r + lane / 4, 0, query_panel) + lane % 4 * 4;
#pragma unroll
            for (int d = 0; d < vectors; d++) {
                const float* x = &o[f][4 * d + 2 * r];
                store_shared(beside(at, d, query_panel), pack<bfloat>(x[0] * inverse, x[1] * inverse));
            }
        }
    }
    __syncwarp();
    for (int n = lane; n < warp_rows * vectors; n += 32) {
        const int row = first + n / vectors, vector = n % vectors;
        if (row >= item.rows) continue;
        uint4 x;
        load_shared4(x.x, x.y, x.z, x.w, to + place(row % rows, vector, query_panel));
        *reinterpret_cast<uint4*>(a.out + ((u64)(item.row + row) * heads + head) * head_dim + vector * 8) = x;
    }
}

extern "C" __global__ void __launch_bounds__(threads, residents)
block_sparse_mma(const u16* q, u16* out, const u8* keys, const u8* values, const int* tables, const Item* items,
                 const int* list, const int* low, int first_block, float scale_log2) {
    const Arguments a{q, out, keys, values, tables, items, list, low, first_block, scale_log2};
    const int head = blockIdx.x % heads, part = blockIdx.x / heads % parts;
    const Item item = items[blockIdx.x / (heads * parts)];
    const int last_row = min((part + 1) * rows, item.rows) - 1;
    if (last_row < part * rows) return;

    const int lane = threadIdx.x % 32, first = part * rows + threadIdx.x / 32 * warp_rows;
    const u32 base = shared_address(memory);
    copy_queries(a, item, head, first);
    Ring ring(a, item, item.position + last_row, head / (heads / kv_heads), base + ring_at);
    int n = ring.steps.next;
#pragma unroll 1
    for (int i = 0; i < slots - 1; i++) ring.advance(a);

    Softmax softmax[fragments];
    Output o;
#pragma unroll
    for (int f = 0; f < fragments; f++) {
        const int row = first + 16 * f + lane / 4;
        const auto low_of = [&](int r) { return __ldg(low + item.row + min(r, item.rows - 1)); };
        softmax[f] = Softmax(item, row, low_of(row), low_of(row + 8));
#pragma unroll
        for (int i = 0; i < head_dim / 2; i++) o[f][i] = 0;
    }
    // Where this lane's rows of 16 bytes lie: of queries and values 16 rows by 16 elements, of keys the other way round.
    const u32 queries_at = base + place(first % rows + lane % 16, lane / 16, query_panel);
    const u32 keys_at = place(lane / 16 * 8 + lane % 8, lane / 8 % 2, slot_panel);
    const u32 values_at = place(lane % 16, lane / 16, slot_panel);
    const int least_low = __shfl_sync(every_lane, softmax[0].low[0], 0);
    const int last_position = first < item.rows ? item.position + min(first + warp_rows, item.rows) - 1 : -1;

#pragma unroll 1
    for (; n < ring.steps.end; n++) {
        const Ring::Slot k = ring.take(a);
        const int key = k.step.first_key();
        // By any of the warp's rows; what none sees would add zeros.
        const bool seen = key <= last_position && (key + step > least_low || key < item.prefix);
        Scores s;
        Probabilities p;
        if (seen) {
            multiply_keys(s, queries_at, k.address + keys_at);
#pragma unroll
            for (int f = 0; f < fragments; f++) {
                float factor[2];
                if (k.step.partial()) softmax[f].mask(s[f], key);
                bool rescale = softmax[f].find_exponents<0>(s[f], factor, scale_log2);
                softmax[f].raise<0>(s[f], factor);
                rescale |= softmax[f].find_exponents<1>(s[f], factor, scale_log2);
                softmax[f].raise<1>(s[f], factor);
                pack_operand<0>(p[f], s[f]);
                pack_operand<1>(p[f], s[f]);
                if (rescale) {
#pragma unroll
                    for (int i = 0; i < head_dim / 2; i++) o[f][i] *= factor[i / 2 % 2];
                }
            }
        }
        const Ring::Slot v = ring.take(a);
        if (seen) multiply_values(o, p, v.address + values_at);
    }
    wait_copies<0>();
    write_rows(a, item, head, first, o, softmax);
}
