// Codes as they lie in shared memory -> operands of the matrix instruction, two codes at a time.
//
// A code alone in the low bits of a half is the subnormal number code * 2^-24, and tensor cores take subnormals
// exactly: masking is all the conversion there is. Sums come out in units of 2^-24, put right once, at the end.
#pragma once
#include "primitives.cuh"

// Half pairs that one loaded word turns into.
template <int bits>
constexpr int pairs_of_word = 16 / bits;

// A key's word holds 32 / bits of its dimensions: pair i is dimensions i and i + 16 / bits of these. A transposed
// word of values holds 16 / bits dimensions of two tokens: pair i is dimension i of both.
// With 4 bits the odd pairs are left four bits higher, in units of 2^-20.
template <int bits>
DEVICE void code_pairs(u32 (&pair)[pairs_of_word<bits>], u32 word) {
    if constexpr (bits == 16) {
        pair[0] = word;
    } else if constexpr (bits == 8) {
        pair[0] = word & 0x00ff00ffu;
        pair[1] = permute_bytes(word, 0, 0x4341);
    } else {
        const u32 upper = word >> 8;
        pair[0] = word & 0x000f000fu;
        pair[1] = word & 0x00f000f0u;
        pair[2] = upper & 0x000f000fu;
        pair[3] = upper & 0x00f000f0u;
    }
}

constexpr float code_units = 16777216.0f;                                // 2^24
template <int bits>
constexpr float odd_pair_units = bits == 4 ? 1048576.0f : 16777216.0f;  // 2^20 or 2^24

// Powers of two as half pairs.
constexpr u32 half_4 = 0x2c002c00u, half_6 = 0x24002400u, half_10 = 0x14001400u, half_14 = 0x04000400u;
