// Codes as they lie in shared memory -> operands of the matrix instruction, two codes at a time.
//
// A code c put under the byte 0x64 reads as the half 1024 + c, exactly; one addition takes the offset away. Keys keep
// their codes (a key's sum is short); values are centred on zero, since their sums run over the whole sequence.
#pragma once
#include "primitives.cuh"

// Half pairs that one loaded word (4 bytes of a row) turns into: bits 16 -> 1, 8 -> 2, 4 -> 4.
template <int bits>
constexpr int pairs_of_word = 16 / bits;

constexpr u32 thousand = 0x64646464u;       // the high byte of 1024 in half precision, four times
constexpr u32 minus_1024 = 0xe400e400u;     // half pairs
constexpr u32 minus_1152 = 0xe480e480u;     // -(1024 + 128)
constexpr u32 minus_1032 = 0xe408e408u;     // -(1024 + 8)
constexpr u32 sixteenth = 0x2c002c00u;
constexpr u32 minus_64 = 0xd400d400u;
constexpr u32 minus_72 = 0xd480d480u;       // -(64 + 8)

// What a centred value's code lost: value = scale * (code - centre) + (bias + centre * scale).
template <int bits>
constexpr u32 centre_pair = bits == 8 ? 0x58005800u : 0x48004800u;  // 128 or 8, as halves

template <int bits, bool centred>
DEVICE void nibbles(u32 (&pair)[4], u32 word) {
    constexpr u32 low = centred ? minus_1032 : minus_1024, high = centred ? minus_72 : minus_64;
    const u32 upper = word >> 8;
    pair[0] = add_halves((word & 0x000f000fu) | 0x64006400u, low);
    pair[1] = fma_halves((word & 0x00f000f0u) | 0x64006400u, sixteenth, high);
    pair[2] = add_halves((upper & 0x000f000fu) | 0x64006400u, low);
    pair[3] = fma_halves((upper & 0x00f000f0u) | 0x64006400u, sixteenth, high);
}

// A word of one key: pairs of two of its dimensions. In 4 bits pair i holds dimensions i and i + 4 of the word's 8.
template <int bits>
DEVICE void key_pairs(u32 (&pair)[pairs_of_word<bits>], u32 word) {
    if constexpr (bits == 16) {
        pair[0] = word;
    } else if constexpr (bits == 8) {
        pair[0] = add_halves(permute_bytes(word, thousand, 0x4140), minus_1024);
        pair[1] = add_halves(permute_bytes(word, thousand, 0x4342), minus_1024);
    } else {
        nibbles<bits, false>(pair, word);
    }
}

// A transposed word, the same dimensions of two tokens: pair i is dimension i of both.
template <int bits>
DEVICE void value_pairs(u32 (&pair)[pairs_of_word<bits>], u32 word) {
    if constexpr (bits == 16) {
        pair[0] = word;
    } else if constexpr (bits == 8) {
        pair[0] = add_halves(permute_bytes(word, thousand, 0x4240), minus_1152);
        pair[1] = add_halves(permute_bytes(word, thousand, 0x4341), minus_1152);
    } else {
        nibbles<bits, true>(pair, word);
    }
}
