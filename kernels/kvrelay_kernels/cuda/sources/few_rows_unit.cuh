// What a lane holds of 16 rows x 64 columns of a weight, and how that becomes operands of the matrix instruction.
//
// A code becomes a number by bit operations alone. For half activations it is the subnormal code * 2^-24, which tensor
// cores take exactly. bfloat16 has no such room below: there four bits under the exponent of 128 are 128 + code, and
// codes of eight bits are two products, of their upper and their lower half. What this adds to a sum is taken off again
// with the bias, by the sum of the activations: a product of the same operand with the number of code 0 in all places.
// 8-bit floats are numbers of both kinds, and have no bias.
#pragma once
#include "coded_matrix.cuh"
#include "elements.cuh"

constexpr u32 code_zero = bfloat && !floats ? 0x43004300u : 0;   // a pair of 128, or of 0
constexpr u32 sum_operand = bfloat ? 0x43004300u : 0x00010001u;  // a pair of 128, or of 2^-24
constexpr int planes = bits == 8 && bfloat && !floats ? 2 : 1;   // products that one code takes
constexpr float sum_unit = bfloat ? 0.0078125f : 1;           // of a sum, in units of a product
constexpr float zero_sums = !bfloat ? 0 : planes == 2 ? 17 : 1;  // what stands for 0 in a product, in sums
constexpr float product_unit = coded && !bfloat ? code_unit : 1;
constexpr int group_steps = unit_steps / unit_groups;
constexpr bool scaled = coded && !row_scaled;  // sums of a group are multiplied by its scale
constexpr bool ragged = RAGGED;  // the last unit of a row is not full

struct WeightUnit {
    u32 words[bits];
    Factors factors[scaled ? 2 * unit_groups : 1];  // [group][row g, row g + 8]

    // Operand of one step, one plane of it. `nibbles` is 0x000f000f.
    DEVICE void operand(u32 (&a)[4], int step, int plane, u32 nibbles) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (bits == 16) {
                a[i] = words[8 * (i % 2) + 2 * step + i / 2];
            } else if constexpr (bits == 4) {
                a[i] = (words[step] >> 4 * i & nibbles) | code_zero;
            } else if constexpr (floats) {
                u32 pair[2];
                if constexpr (bfloat) e4m3_bfloats(pair, words[2 * step + i % 2]);
                else e4m3_halves(pair, words[2 * step + i % 2]);
                a[i] = pair[i / 2];
            } else if constexpr (planes == 2) {
                a[i] = (words[2 * step + i % 2] >> (8 * (i / 2) + 4 * plane) & nibbles) | code_zero;
            } else {
                const u32 word = words[2 * step + i % 2];
                a[i] = i / 2 ? permute_bytes(word, 0, 0x4341) : word & 0x00ff00ffu;
            }
        }
    }
};

DEVICE void put(u32* words, uint4 v) { words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w; }
DEVICE void put(u32* words, uint2 v) { words[0] = v.x, words[1] = v.y; }

// One lane's place in a weight of n rows and k columns.
#if BITS < 16
struct WeightPlace {
    const uint4* codes;
    const Factors* factors;

    DEVICE void move(const u8* data, const Factors* all_factors, int n, int k, int tile, int unit) {
        const int lane = threadIdx.x & 31, units = (k + unit_columns - 1) / unit_columns;
        const u64 at = CodedMatrix::place(min(tile, (n - 1) / tile_rows), unit, units);
        codes = reinterpret_cast<const uint4*>(data + at * unit_code_bytes) + lane;
        factors = all_factors + at * unit_factors + lane / 4 * 2 * unit_groups;
    }

    DEVICE void advance(int units) {
        codes += units * (pair_tiles * unit_code_bytes / 16);
        factors += units * (pair_tiles * unit_factors);
    }

    // The unit so many units behind.
    DEVICE void fetch(WeightUnit& to, int behind) const {
        const uint4* from = codes + behind * (pair_tiles * unit_code_bytes / 16);
#pragma unroll
        for (int i = 0; i < bits / 4; i++) put(to.words + 4 * i, load_once(from + 32 * i));
        if constexpr (!scaled) return;
        const Factors* of = factors + behind * (pair_tiles * unit_factors);
        u32* words = reinterpret_cast<u32*>(to.factors);
        constexpr int bytes = sizeof to.factors;
        if constexpr (bytes == 8) put(words, load_once(reinterpret_cast<const uint2*>(of)));
#pragma unroll
        for (int i = 0; i < bytes / 16; i++) put(words + 4 * i, load_once(reinterpret_cast<const uint4*>(of) + i));
    }
};
#else
struct WeightPlace {
    const uint4* rows[2];
    int left;  // columns from here on, to the end of a row

    DEVICE void move(const u8* data, const Factors*, int n, int k, int tile, int unit) {
        const int lane = threadIdx.x & 31, column = unit * unit_columns + lane % 4 * 8;
        left = k - column;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const u64 row = min(tile * tile_rows + lane / 4 + 8 * h, n - 1);
            rows[h] = reinterpret_cast<const uint4*>(data + 2 * (row * k + column));
        }
    }

    DEVICE void advance(int units) {
        rows[0] += 8 * units, rows[1] += 8 * units;
        left -= units * unit_columns;
    }

    DEVICE void fetch(WeightUnit& to, int behind) const {
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const bool there = !ragged || behind * unit_columns + 32 * i < left;
                put(to.words + 8 * h + 4 * i, there ? load_once(rows[h] + 8 * behind + 4 * i) : uint4{0, 0, 0, 0});
            }
    }
};
#endif

// The other operand: a lane's activations at a group's steps, two words a step; `left` columns are there from here on.
DEVICE void fetch_activations(u32 (&b)[2 * group_steps], const u16* from, int left) {
    if constexpr (run == 4) {
        put(b, !ragged || left > 0 ? *reinterpret_cast<const uint2*>(from) : uint2{0, 0});
    } else {
#pragma unroll
        for (int i = 0; i < group_steps / 2; i++) {
            const bool there = !ragged || 32 * i < left;
            put(b + 4 * i, there ? reinterpret_cast<const uint4*>(from)[4 * i] : uint4{0, 0, 0, 0});
        }
    }
}
