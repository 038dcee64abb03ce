// Codes of 16 rows x 64 columns as operands of the matrix instruction in halves: scale * code + bias, rounded once.
//
// Under the exponent of 1024 a code is 1024 + code, or 1024 + 16 * code where the row's four bits lie higher; both give
// the code exactly, and the one rounding is that of the fused scale * code + bias.
#pragma once
#include "coded_matrix.cuh"

constexpr int group_steps = unit_steps / unit_groups;
constexpr int unit_factor_bytes = unit_factors * int(sizeof(Factors));

// Masks of the lower and of the upper of two rows' four bits, and what goes on top. The compiler must not know them: as
// constants it would put them into registers again before each use.
struct CodeConstants {
    u32 nibbles, upper_nibbles, magic, minus_rest;
    DEVICE explicit CodeConstants(u32 nibbles)
        : nibbles(nibbles), upper_nibbles(nibbles << 4), magic(in_register(0x64006400u)), minus_rest(in_register(0xd400d400u)) {}
};

// A pair of the same half.
#if WIDE_FACTORS
DEVICE u32 twice_scale(Factors f) { return pack<false>(scale_of(f), scale_of(f)); }
DEVICE u32 twice_bias(Factors f) { return pack<false>(bias_of(f), bias_of(f)); }
#else
DEVICE u32 twice_scale(Factors f) { return permute_bytes(f, 0, 0x1010); }
DEVICE u32 twice_bias(Factors f) { return permute_bytes(f, 0, 0x3232); }
#endif

// What one lane holds of a unit.
struct HalfUnit {
    u32 words[bits];
    u32 factors[2 * unit_groups * sizeof(Factors) / 4];  // [group][row g, row g + 8]

    // From shared addresses of the unit's codes and factors.
    DEVICE void load(u32 codes, u32 factors_at) {
        const u32 lane = threadIdx.x & 31;
#pragma unroll
        for (int i = 0; i < bits; i += 4)
            load_shared4(words[i], words[i + 1], words[i + 2], words[i + 3], codes + lane * 16 + i * 128);
        constexpr int count = sizeof factors / 4;
        const u32 at = factors_at + lane / 4 * (4 * count);
        if constexpr (count == 2) load_shared2(factors[0], factors[1], at);
#pragma unroll
        for (int i = 0; i + 3 < count; i += 4)
            load_shared4(factors[i], factors[i + 1], factors[i + 2], factors[i + 3], at + 4 * i);
    }

    DEVICE Factors factors_of(int step, int upper) const {
        const int n = step / group_steps * 2 + upper;
#if WIDE_FACTORS
        return {factors[2 * n], factors[2 * n + 1]};
#else
        return factors[n];
#endif
    }

    // The operand of one step.
    DEVICE void operand(u32 (&a)[4], int step, const CodeConstants& c) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 code;
            if constexpr (bits == 4) {
                const u32 word = i / 2 ? words[step] >> 8 : words[step];
                code = i % 2 ? fma_halves((word & c.upper_nibbles) | 0x64006400u, 0x2c002c00u, c.minus_rest)
                             : add_halves((word & c.nibbles) | 0x64006400u, 0xe400e400u);
            } else {
                code = add_halves(permute_bytes(words[2 * step + i % 2], c.magic, i / 2 ? 0x5351 : 0x5250), 0xe400e400u);
            }
            const Factors f = factors_of(step, i % 2);
            a[i] = fma_halves(code, twice_scale(f), twice_bias(f));
        }
    }
};
