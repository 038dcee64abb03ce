// Codes as they are loaded from shared memory -> operands of the matrix instruction, two codes at a time.
//
// A word of a key holds 32 / width of its dimensions: pair i is dimensions i and i + 16 / width of these. A transposed
// word of values holds 16 / width dimensions of two tokens: pair i is dimension i of both. What comes out is too small
// by a power of two, `units` in even pairs and `odd_units` in odd ones: put right once, at the end. Tensor cores take
// subnormal halves exactly, so masking is nearly all the conversion there is.
#pragma once
#include "levels.cuh"

template <Levels levels, int bits>
struct Codes;

// No codes: 16-bit elements.
template <>
struct Codes<Levels::steps, 16> {
    static constexpr int width = 16;
    static constexpr float units = 1, odd_units = 1;
    DEVICE void halves(u32 (&pair)[1], u32 word) const { pair[0] = word; }
};

// A code alone in the low bits of a half is the subnormal number code * 2^-24.
template <>
struct Codes<Levels::steps, 8> {
    static constexpr int width = 8;
    static constexpr float units = 16777216.0f, odd_units = units;
    DEVICE void halves(u32 (&pair)[2], u32 word) const {
        pair[0] = word & 0x00ff00ffu;
        pair[1] = permute_bytes(word, 0, 0x4341);
    }
};

// Odd pairs are left four bits higher.
template <>
struct Codes<Levels::steps, 4> {
    static constexpr int width = 4;
    static constexpr float units = 16777216.0f, odd_units = units / 16;
    DEVICE void halves(u32 (&pair)[4], u32 word) const {
        const u32 upper = word >> 8;
        pair[0] = word & 0x000f000fu;
        pair[1] = word & 0x00f000f0u;
        pair[2] = upper & 0x000f000fu;
        pair[3] = upper & 0x00f000f0u;
    }
};

// Widened to bytes before (`widen_codes`).
template <>
struct Codes<Levels::steps, 6> : Codes<Levels::steps, 8> {};

template <>
struct Codes<Levels::e4m3, 8> {
    static constexpr int width = 8;
    static constexpr float units = e4m3_units, odd_units = units;
    DEVICE void halves(u32 (&pair)[2], u32 word) const { e4m3_halves(pair, word); }
};

// Two exponent bits and one of mantissa where a half has its lowest two and its highest: exponents begin 14 lower. Left
// shifts are no work for the pipe that all bits go through.
template <>
struct Codes<Levels::e2m1, 4> {
    static constexpr int width = 4;
    static constexpr float units = 16384.0f, odd_units = units;
    DEVICE void halves(u32 (&pair)[4], u32 word) const {
        const u32 even = choose_bits(word << 4, word << 1, 0x80808080u);  // high bytes of halves, before they are masked
        const u32 odd = choose_bits(word, word >> 3, 0x80808080u);
        pair[0] = even << 8 & 0x8e008e00u;
        pair[1] = odd << 8 & 0x8e008e00u;
        pair[2] = even & 0x8e008e00u;
        pair[3] = odd & 0x8e008e00u;
    }
};

// A table of eight halves, as two of bytes: nibbles of a word select from it four at a time. With three bits the sign is
// a part of the index, with four it comes on top. Three bits were widened to four before.
template <int bits>
struct Codes<Levels::codebook, bits> {
    static constexpr int width = 4;
    static constexpr float units = 1, odd_units = 1;
    static constexpr u32 entry(int i) { return bits == 3 && i > 3 ? magnitude_bits(i - 4) | 0x8000 : magnitude_bits(i); }
    // Bytes `first` to `first + 3` of the table of low (shift 0) or high (shift 8) bytes.
    static constexpr u32 table(int first, int shift) {
        u32 bytes = 0;
        for (int i = 0; i < 4; i++) bytes |= (entry(first + i) >> shift & 0xff) << 8 * i;
        return bytes;
    }
    u32 low, high;  // the first halves of both tables of bytes

    DEVICE Codes() : low(in_register(table(0, 0))), high(in_register(table(0, 8))) {}
    DEVICE void halves(u32 (&pair)[4], u32 word) const {
        const u32 codes = permute_bytes(word, 0, 0x3120);  // nibbles 0, 1, 4, 5, 2, 3, 6, 7
        const u32 indices = bits == 3 ? codes : codes & 0x77777777u, signs = codes << 4;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u32 index = indices >> 16 * i;
            const u32 lower = permute_bytes(low, table(4, 0), index);
            u32 upper = permute_bytes(high, table(4, 8), index);
            // A selector's highest bit spreads a byte's sign over it.
            if constexpr (bits == 4) upper |= permute_bytes(codes, signs, i == 0 ? 0x9d8c : 0xbfae) & 0x80808080u;
            pair[2 * i] = permute_bytes(lower, upper, 0x6240);
            pair[2 * i + 1] = permute_bytes(lower, upper, 0x7351);
        }
    }
};

// Codes of 6 bits, 4 of them, to bytes; of 3 bits, 8 of them, to nibbles. Each step opens gaps in the middle of all parts.
template <int bits>
DEVICE u32 widen_codes(u32 x) {
    x &= 0x00ffffffu;
    x += (x & 0x00fff000u) * 15;
    x += (x & 0x0fc00fc0u) * 3;
    if constexpr (bits == 3) x += x & 0x38383838u;
    return x;
}

// Four bits of a codebook, by a table in shared memory of all pairs of codes: it takes half of the selecting above off
// the pipe that all bits go through. Each lane has a table of its own, in a bank of its own.
template <Levels levels, int bits>
struct TabledCodes : Codes<levels, bits> {
    static constexpr bool tabled = false;
    DEVICE explicit TabledCodes(u32) {}
    DEVICE static void fill(u32, int) {}
    DEVICE void keys(u32 (&pair)[32 / TabledCodes::width / 2], u32 word) const { this->halves(pair, word); }
};
constexpr int lane_table_bytes = 256 * 4, table_bytes = 32 * lane_table_bytes;

template <>
struct TabledCodes<Levels::codebook, 4> {
    using Select = Codes<Levels::codebook, 4>;
    static constexpr bool tabled = true;
    static constexpr int width = Select::width;
    static constexpr float units = Select::units, odd_units = Select::odd_units;
    u32 column, row_bytes;  // a number that the compiler knows, it would shift by, on the busy pipe

    DEVICE explicit TabledCodes(u32 table) : column(table + threadIdx.x % 32 * 4), row_bytes(in_register(128)) {}
    DEVICE static void fill(u32 table, int threads) {
        const Select select;
        for (int n = threadIdx.x; n < table_bytes / 16; n += threads) {
            const u32 codes = n / 8;
            u32 pair[4];
            select.halves(pair, (codes & 15) | codes >> 4 << 16);
            store_shared4(table + 16 * n, pair[0], pair[0], pair[0], pair[0]);
        }
    }
    DEVICE u32 look_up(u32 codes) const { return load_shared(codes * row_bytes + column); }
    // Of a key, which may be paired as its codes lie: pair i is dimensions 2i and 2i + 1.
    DEVICE void keys(u32 (&pair)[4], u32 word) const {
        pair[0] = look_up(word & 0xff), pair[1] = look_up(permute_bytes(word, 0, 0x4441));
        pair[2] = look_up(permute_bytes(word, 0, 0x4442)), pair[3] = look_up(word >> 24);
    }
    DEVICE void halves(u32 (&pair)[4], u32 word) const {
        const u32 even = word & 0x0f0f0f0fu, odd = word >> 4 & 0x0f0f0f0fu;
        const u32 evens = (even >> 16) * 16 + even, odds = (odd >> 16) * 16 + odd;
        pair[0] = look_up(evens & 0xff), pair[1] = look_up(odds & 0xff);
        pair[2] = look_up(permute_bytes(evens, 0, 0x4441)), pair[3] = look_up(permute_bytes(odds, 0, 0x4441));
    }
};

// Powers of two as half pairs: 2^-n, and 2^n.
constexpr u32 half_0 = 0x3c003c00u, half_4 = 0x2c002c00u, half_6 = 0x24002400u, half_10 = 0x14001400u, half_14 = 0x04000400u;
constexpr u32 twice_15 = 0x78007800u;
