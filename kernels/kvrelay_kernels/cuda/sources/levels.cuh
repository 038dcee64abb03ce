// The numbers that codes stand for where they are no steps above a bias (quant/levels.py): an 8-bit float, or a
// table of magnitudes, a code being a sign above an index.
#pragma once
#include "e4m3.cuh"

enum class Levels { steps, e4m3, e2m1, codebook };  // in the order of cuda/format_constants.py

// Magnitudes of a table as halves, two to a word, zeros behind the last.
constexpr u32 magnitude_pairs[4] = {MAGNITUDES_0, MAGNITUDES_1, MAGNITUDES_2, MAGNITUDES_3};
constexpr u32 magnitude_bits(int index) { return magnitude_pairs[index / 2] >> index % 2 * 16 & 0xffff; }
constexpr float magnitude(int index) {
    const u32 word = magnitude_bits(index), exponent = word >> 10;
    float size = (word & 0x3ff) + (exponent ? 0x400 : 0);
    for (u32 e = exponent ? exponent : 1; e < 25; e++) size /= 2;
    return size;
}

// Half-way points between neighbours; behind the end of the table they mean nothing.
struct HalfWay {
    float at[7];
    constexpr HalfWay() : at() {
        for (int i = 0; i < 7; i++) at[i] = (magnitude(i) + magnitude(i + 1)) / 2;
    }
};
constexpr HalfWay half_way;

// What the codes of `bits` are told apart by, for one scale: the half-way points times it. Both have so few bits that
// the products are exact; and an element's quotient by the scale, rounded, lies on a half-way point or beyond just
// where the element lies on the product or beyond. So nothing is divided.
template <int bits>
struct Edges {
    static constexpr int magnitudes = 1 << (bits - 1);
    float at[magnitudes - 1];
    u32 negative;  // words above it have a sign; those of zero, and of what a division would make zero, do not

    DEVICE explicit Edges(float scale) {
#pragma unroll
        for (int i = 0; i < magnitudes - 1; i++) at[i] = __fmul_rn(half_way.at[i], scale);
        negative = 0x80000000u + (magnitude_bits(0) ? u32(scale / 2) : 0);
    }

    // The code of the nearest magnitude; on an edge the even one.
    DEVICE u32 encode(float x) const {
        const float size = fabsf(x);
        u32 index;
        if constexpr (bits == 4) {
            const bool four = size >= at[3], two = size >= (four ? at[5] : at[1]);
            const float last = four ? two ? at[6] : at[4] : two ? at[2] : at[0];
            index = four << 2 | two << 1 | int(size > last);
        } else {
            const bool two = size >= at[1];
            index = two << 1 | int(size > (two ? at[2] : at[0]));
        }
        const bool sign = __float_as_uint(x) > negative & (magnitude_bits(0) > 0 | index > 0);
        return index | (sign ? magnitudes : 0);
    }
};

constexpr u32 even_bytes(u32 a, u32 b) { return a & 0xff | a >> 8 & 0xff00 | (b & 0xff | b >> 8 & 0xff00) << 16; }

// Four codes of a table in the low bits -> halves.
template <int bits>
DEVICE void table_halves(u32 (&pair)[2], u32 codes) {
    static_assert(bits == 4 || bits == 3, "a table of eight entries");
    // Eight entries, two to a word: with three bits the sign, too, is a part of the index.
    constexpr u32 sign = bits == 3 ? 0x80008000u : 0;
    constexpr u32 a = magnitude_pairs[0], b = magnitude_pairs[1];
    constexpr u32 c = bits == 3 ? a | sign : magnitude_pairs[2], d = bits == 3 ? b | sign : magnitude_pairs[3];
    constexpr u32 low[2] = {even_bytes(a, b), even_bytes(c, d)};
    constexpr u32 high[2] = {even_bytes(a >> 8, b >> 8), even_bytes(c >> 8, d >> 8)};
    const u32 apart = codes & 7 | (codes & 0x38) << 1 | (codes & 0x1c0) << 2 | (codes & 0xe00) << 3;
    const u32 indices = bits == 4 ? codes & 0x7777u : apart;
    const u32 lower = permute_bytes(low[0], low[1], indices), upper = permute_bytes(high[0], high[1], indices);
    pair[0] = permute_bytes(lower, upper, 0x5140);
    pair[1] = permute_bytes(lower, upper, 0x7362);
    if constexpr (bits == 4) {
        pair[0] |= codes << 12 & 0x8000u | codes << 24 & 0x80000000u;
        pair[1] |= codes << 4 & 0x8000u | codes << 16 & 0x80000000u;
    }
}
