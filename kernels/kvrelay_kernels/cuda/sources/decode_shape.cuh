// What one compiled decode kernel is fixed to (macros come from the launcher), and what follows from that.
#pragma once
#include "cache_format.cuh"
#include "codes.cuh"

constexpr int heads_per_kv = HEADS_PER_KV;
constexpr int rows = ROWS;              // query rows of a sequence: its last tokens
constexpr int query_tile = QUERY_TILE;  // queries a thread block works on at once: 8 or 16
constexpr bool bfloat = BFLOAT;         // of queries, output and uncoded elements; otherwise float16
constexpr int warps = WARPS;
constexpr int side = SIDE;              // KV heads a thread block works on side by side, as they lie in a block
constexpr int team = warps / side;      // warps of each
constexpr int stages = STAGES;          // tiles of a warp in its ring of shared memory
constexpr int tile = TILE;              // tokens of one step of a warp

constexpr bool coded = bits < 16;
constexpr bool affine = coded && levels == Levels::steps;
constexpr bool bfloat_product = bfloat && !coded;
constexpr int groups = coded ? head_dim / group : 1;
// A group that is no longer than a matrix instruction is deep has no sum of its own: its scale comes into the codes.
constexpr bool scaled_codes = coded && group == 16;
constexpr int sum_groups = scaled_codes ? 1 : groups;

// Codes that straddle words are widened in shared memory before they are loaded as matrices.
using Code = TabledCodes<levels, bits>;
constexpr int width = Code::width;      // of an element as it is loaded: 16, 8 or 4 bits
constexpr bool widened = width != bits && coded;
constexpr int fetched_row_bytes = head_dim * bits / 8, row_bytes = head_dim * width / 8;
constexpr int chunks = row_bytes / 16;
constexpr int pairs = 16 / width;       // half pairs that one loaded word turns into
constexpr int steps = head_dim / 16;    // matrix instructions that span the head dimension
constexpr int query_halves = query_tile / 8;
constexpr int queries = rows * heads_per_kv;
constexpr int query_tiles = (queries + query_tile - 1) / query_tile;
constexpr int tile_queries = queries < query_tile ? queries : query_tile;
constexpr int subtiles = tile / 16;
constexpr int tiles_per_block = block_tokens / tile;

// What scores and values are short of, inside and outside the products.
constexpr float scaled_units = 128;     // of a code times its scale, where this comes into the codes
constexpr float code_units = scaled_codes ? scaled_units : Code::units;
constexpr float odd_pair_units = scaled_codes ? scaled_units : Code::odd_units;
constexpr bool uneven = code_units != odd_pair_units;

// Shared memory. A warp's ring: stages of K rows and V rows; behind it, if need be, one stage of widened codes and of scales
// as halves; its scales beside it: K scales, K biases, V scales, V biases.
constexpr int whole_boxes(int bytes) { return (bytes + 1023) / 1024 * 1024; }
constexpr int scale_size = scale_kind == Scales::float16 ? 2 : 1;
constexpr int scale_frames = affine ? 4 : 2;
constexpr int scale_bytes = coded ? tile * groups * scale_size : 0;  // of one frame
constexpr int v_scales_at = scale_frames / 2 * scale_bytes;
constexpr int fetched_v_at = whole_boxes(tile * fetched_row_bytes), v_at = whole_boxes(tile * row_bytes);
constexpr int stage_bytes = 2 * fetched_v_at, widened_bytes = widened ? 2 * v_at : 0;
constexpr int raised_token_bytes = 2 * groups, raised_bytes = scaled_codes ? whole_boxes(2 * tile * raised_token_bytes) : 0;
constexpr int ring_bytes = stages * stage_bytes + widened_bytes + raised_bytes;
constexpr int scales_at = warps * ring_bytes;
constexpr int barriers_at = scales_at + warps * stages * scale_frames * scale_bytes;
constexpr int area_pitch = head_dim + 4;  // floats; keeps the merge's stores off each other's banks
constexpr int area_bytes = warps * tile_queries * area_pitch * 4;
constexpr int area_at = barriers_at + (warps * stages * 8 + 15) / 16 * 16;
constexpr int peaks_at = area_at + area_bytes;
constexpr int sums_at = peaks_at + warps * query_tile * 4;
constexpr int table_at = (sums_at + warps * query_tile * 4 + 127) / 128 * 128;
static_assert(team <= 16 * tiles_per_block);  // see Feed::block_of
static_assert(kv_heads % side == 0 && warps % side == 0);
static_assert(scale_bytes % 16 == 0 && tile % 16 == 0 && tile * fetched_row_bytes % 16 == 0);

// Boxes are rows of 128 bytes of the arena; what lies otherwise is copied by threads.
constexpr bool boxed = !widened && (k_side.codes | v_side.codes | block_bytes | tile * row_bytes) % 128 == 0;

// The head dimension that row `lane / 4` of output step `step` stands for, and the distance to row `lane / 4 + 8`.
constexpr int output_stride = coded ? 1 : 8;
DEVICE int output_dim(int step, int g) {
    if constexpr (width == 16) return 16 * step + g;
    if constexpr (width == 8) return 16 * step + 2 * g;
    return 32 * (step / 2) + 4 * g + 2 * (step % 2);
}
