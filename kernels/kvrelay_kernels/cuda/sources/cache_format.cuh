// The cache format that a kernel is compiled for, as cuda/format_constants.py tells it.
#pragma once
#include "scales.cuh"

constexpr int bits = BITS, group = GROUP;  // of an element, 16 where there are no codes; elements that share a scale
constexpr Levels levels = Levels(LEVELS);
constexpr int table_bits = bits == 3 ? 3 : 4;  // of a code, where numbers lie in a table
constexpr Scales scale_kind = Scales(SCALES);
constexpr bool rotates_values = ROTATES_VALUES;
constexpr int head_dim = HEAD_DIM, kv_heads = KV_HEADS;
constexpr int run = head_dim & -head_dim;  // elements that are rotated together
constexpr int block_tokens = 64, block_bytes = BLOCK_BYTES;
static_assert(bits == 16 || head_dim % group == 0);

// Where K or V lies in a block.
struct Side {
    int codes, scales, biases;
};
constexpr Side k_side = {K_CODES, K_SCALES, K_BIASES}, v_side = {V_CODES, V_SCALES, V_BIASES};
