// Rows of x as halves, as `stream_codes` multiplies with them: in the order of columns in which lanes have codes.
//
// A bfloat16 is a half with more exponent and less fraction: where all of a row's 64 columns lie in a half's range they are
// taken as they are, otherwise times a power of two, which the sums are told. What is 2^-17 of the largest of them or more
// keeps all its bits.
#pragma once
#include "coded_matrix.cuh"

// Bytes from the rows' begin, in rows of 64 halves, swizzled, to where a lane's pair q of four goes that has the 16 bytes
// `piece` of a row.
DEVICE u32 pair_place(int row, int piece, int q) {
    const int step = run == 8 ? piece / 4 * 2 + q / 2 : piece / 2;
    const int t = run == 8 ? piece % 4 : piece % 2 * 2 + q / 2;
    return swizzled(row * 128 + step * 32 + q % 2 * 16 + t * 4);
}

// The power of two, 2^(-23 c), that takes bfloat16 with this exponent of the largest size to where halves are exact.
DEVICE float power_for(int exponent) {
    const int c = exponent == 0 ? 0 : max(exponent - 73, 0) / 23 - 2;
    return __uint_as_float(u32(127 - 23 * c) << 23);
}
DEVICE bool needs_power(int exponent) { return exponent != 0 && u32(exponent - 119) > 22; }
DEVICE float inverse_power(float power) { return __uint_as_float((254u << 23) - __float_as_uint(power)); }

// The exponent of the largest of the 64 bfloat16 of a row, of which eight lanes have eight each.
DEVICE int largest_exponent(const u32 (&v)[4]) {
    u32 size = 0;
#pragma unroll
    for (int q = 0; q < 4; q++) size = max(size, max(v[q] << 1, v[q] << 17));  // without the sign
    int exponent = size >> 24;
#pragma unroll
    for (int mask = 1; mask < 8; mask *= 2) exponent = max(exponent, __shfl_xor_sync(every_lane, exponent, mask));
    return exponent;
}

// Eight bfloat16 times a power of two as halves.
DEVICE void round_to_halves(u32 (&v)[4], float power) {
#pragma unroll
    for (int q = 0; q < 4; q++) v[q] = pack<false>(low_bfloat(v[q]) * power, high_bfloat(v[q]) * power);
}
