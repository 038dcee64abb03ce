// A matrix of 4- or 8-bit codes in the order in which a warp's lanes hold it as operand of the matrix instruction.
//
// Tiles of 16 rows, units of 64 columns. A unit is four steps of m16n8k16; lane l = 4g + t has rows g and g + 8, and four
// columns a step. Which columns a step takes is free, as long as the other operand takes the same and no step crosses a
// group: a lane's are `run` neighbours, so that it reads activations 16 bytes at a time. `cuda/coded_matrix.py` packs.
#pragma once
#include "e4m3.cuh"

constexpr int bits = BITS;    // of a code; 16: elements, row by row, and nothing of this file
constexpr bool coded = bits < 16;
constexpr bool floats = FLOATS;           // codes are 8-bit floats
constexpr bool row_scaled = GROUP == 0;   // a row has one scale, which its sums are multiplied by
constexpr int group = row_scaled ? 64 : GROUP;  // columns that share a scale and a bias: 16, 32 or 64

constexpr int tile_rows = 16, unit_columns = 64, unit_steps = 4;
constexpr int pair_tiles = 2;  // that lie side by side: unit by unit, both
constexpr int run = coded && group == 16 ? 4 : 8;
constexpr int unit_groups = coded ? unit_columns / group : 1;
constexpr int unit_code_bytes = tile_rows * unit_columns * bits / 8;

// Scale and bias of one group of a row, in the matrix's unit, that of biases 2^24 times as large: halves where that loses
// nothing.
constexpr float bias_unit = 16777216;
#if FLOATS
using Factors = u32;  // a scale as float32, and no bias
DEVICE float scale_of(Factors f) { return __uint_as_float(f); }
DEVICE float stored_bias(Factors) { return 0; }
#elif WIDE_FACTORS
using Factors = uint2;
DEVICE float scale_of(Factors f) { return __uint_as_float(f.x); }
DEVICE float stored_bias(Factors f) { return __uint_as_float(f.y); }
#else
using Factors = u32;
DEVICE float scale_of(Factors f) { return low_half(f); }
DEVICE float stored_bias(Factors f) { return high_half(f); }
#endif
DEVICE float bias_of(Factors f) { return stored_bias(f) * bias_unit; }
constexpr float code_unit = floats ? e4m3_units : bias_unit;  // what a half made of a code's bits alone is short of
constexpr int unit_factors = row_scaled ? 0 : tile_rows * unit_groups;  // [row % 8][group][row / 8]

// What a row's sums are multiplied by, beside the matrix's unit.
DEVICE float row_scale(const Factors* of_rows, int row) { return row_scaled ? scale_of(__ldg(of_rows + row)) : 1; }

struct CodedMatrix {
    const u8* codes;
    const Factors* factors;  // of units, or of rows
    int units;  // of a row

    // Where a unit of a tile lies.
    DEVICE static u64 place(int tile, int unit, int units) {
        return ((u64)(tile / pair_tiles) * units + unit) * pair_tiles + tile % pair_tiles;
    }

    // Values of a row at columns k to k + 3, in the matrix's unit; k is a multiple of 4.
    DEVICE void values(float (&x)[4], int row, int k) const {
        const int g = row % 8, upper = row / 8 % 2, column = k % unit_columns;
        const int step = run == 8 ? column / 32 * 2 + column % 8 / 4 : column / 16;
        const int lane = 4 * g + (run == 8 ? column % 32 / 8 : column % 16 / 4);
        const u64 unit = place(row / tile_rows, k / unit_columns, units);
        const u32* words = reinterpret_cast<const u32*>(codes + unit * unit_code_bytes);
        const u64 at = row_scaled ? row : unit * unit_factors + (g * unit_groups + column / group) * 2 + upper;
        const Factors f = __ldg(factors + at);
        const u32 word = bits == 4 ? __ldg(words + 4 * lane + step) >> 4 * upper
                                   : __ldg(words + step / 2 * 128 + 4 * lane + step % 2 * 2 + upper);
        u32 pair[2];
        if constexpr (floats) e4m3_halves(pair, word);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (floats) {
                x[i] = __fmul_rn((i % 2 ? high_half(pair[i / 2]) : low_half(pair[i / 2])) * e4m3_units, scale_of(f));
            } else {
                const u32 code = word >> (8 * (i / 2) + 16 * (i % 2)) & ((1 << bits) - 1);
                x[i] = __fadd_rn(__fmul_rn(float(code), scale_of(f)), bias_of(f));
            }
        }
    }
};
