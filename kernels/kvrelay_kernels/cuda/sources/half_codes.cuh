// Codes of 16 rows x 64 columns as operands of the matrix instruction in halves: scale * code + bias, rounded once.
// So are 8-bit floats, whose bits are halves' but for the unit, times their scale in a half, if that is not left to sums.
//
// A code in the low bits of a half is the subnormal code * 2^-24, or 16 times that where the upper row's four bits lie. The
// matrix's unit is such that a fused scale * code + bias is what is wanted, in units of 2^24 of the matrix's.
#pragma once
#include "coded_matrix.cuh"

constexpr int group_steps = unit_steps / unit_groups;
constexpr int unit_factor_bytes = unit_factors * int(sizeof(Factors));

// A pair of the same half.
#if FLOATS || WIDE_FACTORS
DEVICE u32 twice_scale(Factors f) { return pack<false>(scale_of(f), scale_of(f)); }
DEVICE u32 twice_bias(Factors f) { return pack<false>(stored_bias(f), stored_bias(f)); }
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
        if constexpr (row_scaled) return;
        constexpr int count = sizeof factors / 4;
        const u32 at = factors_at + lane / 4 * (4 * count);
        if constexpr (count == 2) load_shared2(factors[0], factors[1], at);
#pragma unroll
        for (int i = 0; i + 3 < count; i += 4)
            load_shared4(factors[i], factors[i + 1], factors[i + 2], factors[i + 3], at + 4 * i);
    }

    DEVICE Factors factors_of(int step, int upper) const {
        const int n = step / group_steps * 2 + upper;
#if !FLOATS && WIDE_FACTORS
        return {factors[2 * n], factors[2 * n + 1]};
#else
        return factors[n];
#endif
    }

    // The operand of one step.
    DEVICE void operand(u32 (&a)[4], int step) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 word = words[bits == 4 ? step : 2 * step + i % 2];
            const Factors f = factors_of(step, i % 2);
            if constexpr (floats) {
                a[i] = halves_of_upper(i / 2 ? word : word << 8);
                if constexpr (!row_scaled) a[i] = multiply_halves(a[i], twice_scale(f));
                continue;
            }
            u32 code, scale = twice_scale(f);
            if constexpr (bits == 4) {
                code = (i / 2 ? word >> 8 : word) & (i % 2 ? 0x00f000f0u : 0x000f000fu);
                if (i % 2) scale = multiply_halves(scale, 0x2c002c00u);  // 1/16
            } else {
                code = i / 2 ? permute_bytes(word, 0, 0x4341) : word & 0x00ff00ffu;
            }
            a[i] = fma_halves(code, scale, twice_bias(f));
        }
    }
};
