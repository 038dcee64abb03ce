// What one compiled decode kernel is fixed to (macros come from the launcher), and what follows from that.
#pragma once
#include "codes.cuh"

constexpr int bits = BITS;              // of an element: 16 (uncoded), 8, 4
constexpr int head_dim = HEAD_DIM;
constexpr int group = GROUP;            // elements that share a scale; unused in 16 bit
constexpr int kv_heads = KV_HEADS;
constexpr int heads_per_kv = HEADS_PER_KV;
constexpr int rows = ROWS;              // query rows of a sequence: its last tokens
constexpr int query_tile = QUERY_TILE;  // queries a thread block works on at once: 8 or 16
constexpr bool bfloat = BFLOAT;         // of queries, output and uncoded elements; otherwise float16
constexpr int warps = WARPS;
constexpr int stages = STAGES;          // tiles of a warp in its ring of shared memory
constexpr int tile = TILE;              // tokens of one step of a warp
constexpr int block_tokens = 64;
constexpr int block_bytes = BLOCK_BYTES;

// Byte offsets in a block (quant/layout.py).
constexpr int k_codes = K_CODES, k_scales = K_SCALES, k_biases = K_BIASES;
constexpr int v_codes = V_CODES, v_scales = V_SCALES, v_biases = V_BIASES;

constexpr bool coded = bits < 16;
constexpr bool bfloat_product = bfloat && !coded;
constexpr int groups = coded ? head_dim / group : 1;
constexpr int row_bytes = head_dim * bits / 8;
constexpr int chunks = row_bytes / 16;
constexpr int pairs = pairs_of_word<bits>;
constexpr int steps = head_dim / 16;  // matrix instructions that span the head dimension
constexpr int query_halves = query_tile / 8;
constexpr int queries = rows * heads_per_kv;
constexpr int query_tiles = (queries + query_tile - 1) / query_tile;
constexpr int tile_queries = queries < query_tile ? queries : query_tile;
constexpr int subtiles = tile / 16;
constexpr int tiles_per_block = block_tokens / tile;

// Shared memory. A warp's ring: stages of K rows and V rows; its scales beside it: K scales, K biases, V scales, V biases.
constexpr int scale_bytes = coded ? tile * groups * 2 : 0;  // of one of the four
constexpr int v_at = tile * row_bytes;
constexpr int stage_bytes = 2 * v_at;
constexpr int scales_at = warps * stages * stage_bytes;
constexpr int barriers_at = scales_at + warps * stages * 4 * scale_bytes;
constexpr int area_pitch = head_dim + 4;  // floats; keeps the merge's stores off each other's banks
constexpr int area_bytes = warps * tile_queries * area_pitch * 4;
constexpr int area_at = barriers_at + (warps * stages * 8 + 15) / 16 * 16;
constexpr int peaks_at = area_at + area_bytes;
constexpr int sums_at = peaks_at + warps * query_tile * 4;
constexpr int flag_at = sums_at + warps * query_tile * 4;
static_assert(scale_bytes % 16 == 0 && tile % 16 == 0 && v_at % 1024 == 0 && k_codes % 128 == 0 && v_codes % 128 == 0);

// The head dimension that row `lane / 4` of output step `step` stands for, and the distance to row `lane / 4 + 8`.
constexpr int output_stride = coded ? 1 : 8;
DEVICE int output_dim(int step, int g) {
    if constexpr (bits == 16) return 16 * step + g;
    if constexpr (bits == 8) return 16 * step + 2 * g;
    return 32 * (step / 2) + 4 * g + 2 * (step % 2);
}
