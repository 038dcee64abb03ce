// 8-bit floats: a sign, 4 bits of exponent, 3 of mantissa. Moved by a bit, they are halves that are too small by a power
// of two, subnormal ones too: a half has one bit of exponent more.
#pragma once
#include "primitives.cuh"

constexpr float e4m3_units = 256;  // what a half is short of
constexpr float e4m3_largest = 448;

// The code of the nearest e4m3 of what is not NaN; halves go to even, too large sizes to the largest.
DEVICE u32 encode_e4m3(float x) {
    constexpr float smallest_normal = 0.015625f, unit_of_steps = 16384;  // whose neighbours are subnormal steps apart
    const u32 word = __float_as_uint(x), sizes = word & 0x7fffffffu;
    const float size = __uint_as_float(sizes);
    const u32 normal = (sizes + 0x7ffffu + (sizes >> 20 & 1) >> 20) - (120u << 3);
    const u32 subnormal = __float_as_uint(__fadd_rn(size, unit_of_steps)) - __float_as_uint(unit_of_steps);
    return min(size < smallest_normal ? subnormal : normal, 0x7eu) | word >> 24 & 0x80u;
}

// The codes in bytes 1 and 3 -> halves in units of `e4m3_units`.
DEVICE u32 halves_of_upper(u32 codes) { return codes & 0x80008000u | codes >> 1 & 0x3f803f80u; }
// Two codes in the low 16 bits.
DEVICE u32 e4m3_halves(u32 codes) { return halves_of_upper(permute_bytes(codes, 0, 0x1404)); }
// Four codes: those in bytes 0 and 2, and those in bytes 1 and 3.
DEVICE void e4m3_halves(u32 (&pair)[2], u32 codes) {
    pair[0] = halves_of_upper(codes << 8);
    pair[1] = halves_of_upper(codes);
}

// The same in bfloat16, in units of 1. Its exponents go further down: it takes a product to bring codes there.
DEVICE void e4m3_bfloats(u32 (&pair)[2], u32 codes) {
    constexpr u32 twice_2_120 = 0x7b807b80u;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 upper = i ? codes : codes << 8;
        pair[i] = multiply_bfloats(upper & 0x80008000u | upper >> 4 & 0x07f007f0u, twice_2_120);
    }
}
