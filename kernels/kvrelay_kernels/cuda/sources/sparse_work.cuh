// What both block-sparse kernels are fixed to (macros come from the launcher), and the work that the host laid out.
#pragma once
#include "primitives.cuh"

constexpr int head_dim = HEAD_DIM;  // 64, 96, 128 or 256
constexpr int heads = HEADS;
constexpr int kv_heads = KV_HEADS;
constexpr bool bfloat = BFLOAT;  // of all elements; otherwise float16

constexpr int mask_tile = 128;   // queries and keys of a tile of the mask
constexpr int block_tokens = 64;

// In shared memory a matrix is cut into panels of 64 columns: rows of 128 bytes, swizzled.
constexpr int panels = (head_dim + 63) / 64;

// A query tile of one sequence, which all heads share.
struct __align__(16) Item {
    int row, rows;       // in the step's queries
    int position;        // of the first row in its sequence
    int table;           // where its sequence's blocks begin in the tables
    int first, tiles;    // of its list of key tiles, the last key first: tile * 2 + whether some of it is masked
    int prefix, length;  // keys that every row sees up to its own; keys of the sequence
};
