// Scales (and biases) as they lie in shared memory beside the codes of a tile.
#pragma once
#include "decode_shape.cuh"

constexpr int token_scale_bytes = groups * scale_size;

// A float16 scale or bias, or the power of two of an e8m0: its byte where a float has its exponent, so that NaN becomes
// infinity (times the sum of its codes, which are all zero) and 2^-127 zero.
DEVICE float scale_in(const u32* word, int n) {
    if constexpr (scale_size == 2) return n % 2 ? high_half(word[n / 2]) : low_half(word[n / 2]);
    const u32 w = word[n / 4];
    return __uint_as_float((n % 4 == 3 ? w >> 1 : w << (23 - n % 4 * 8)) & 0x7f800000u);
}

// Bytes of shared memory as words; the address is a multiple of the largest power of two, up to 16, that divides them.
template <int bytes>
DEVICE void load_words(u32 (&word)[(bytes + 3) / 4], u32 at) {
    constexpr int words = (bytes + 3) / 4;
    if constexpr (bytes % 2) {
#pragma unroll
        for (int i = 0; i < bytes; i++) {
            const u32 byte = load_shared_byte(at + i);
            word[i / 4] = i % 4 ? word[i / 4] | byte << i % 4 * 8 : byte;
        }
    } else if constexpr (bytes % 4) {
#pragma unroll
        for (int i = 0; i < bytes / 2; i++) {
            const u32 half = load_shared_half(at + 2 * i);
            word[i / 2] = i % 2 ? word[i / 2] | half << 16 : half;
        }
    } else if constexpr (words == 2) {
        load_shared2(word[0], word[1], at);
    } else if constexpr (words % 4 == 0) {
#pragma unroll
        for (int i = 0; i < words; i += 4) load_shared4(word[i], word[i + 1], word[i + 2], word[i + 3], at + 4 * i);
    } else {
#pragma unroll
        for (int i = 0; i < words; i++) word[i] = load_shared(at + 4 * i);
    }
}

// What is stored for one token.
struct TokenScales {
    u32 word[(token_scale_bytes + 3) / 4];

    DEVICE explicit TokenScales(u32 at) { load_words<token_scale_bytes>(word, at); }
    DEVICE float of(int index) const { return scale_in(word, index); }
};

// What is stored for tokens 2t and 2t + 1 of eight; number token * groups + group.
struct PairScales {
    u32 word[(2 * token_scale_bytes + 3) / 4];

    DEVICE explicit PairScales(u32 at) { load_words<2 * token_scale_bytes>(word, at); }
    // What is stored for one group, of token 2t in the low half of a word and of 2t + 1 in the high half.
    DEVICE u32 both(int index) const {
        const int n = groups + index;
        if constexpr (scale_size == 2)
            return permute_bytes(word[index / 2], word[n / 2], (n % 2 ? 0x7600 : 0x5400) + (index % 2 ? 0x32 : 0x10));
        const u32 selector = index % 4 | (4 + n % 4) << 8;
        return permute_bytes(word[index / 4], word[n / 4], selector) & 0x00ff00ffu;
    }
};

// A pair of e4m3 scales, seven bits higher than stored (2^-8 of their numbers as halves), 2^7 times as large as they are:
// times a code of 2^-14 of its number this is exact. What stands for NaN would be 480: what is above 448 is added once
// more, and becomes infinity (the codes of such a group are zero).
DEVICE u32 e4m3_scale_halves(u32 raised) {
    constexpr u32 minus_448 = 0xfb00fb00u;  // as large as they are to be
    return fma_halves(raised, twice_15, fma_halves_relu(raised, twice_15, minus_448));
}

// Scales of short groups, raised to halves once for all lanes that need them: a word has those of two groups.
struct RaisedScales {
    static constexpr int words = (raised_token_bytes + 3) / 4;
    u32 word[words];

    DEVICE explicit RaisedScales(u32 at) { load_words<raised_token_bytes>(word, at); }
};

// Of a tile's tokens, K's or V's.
DEVICE void raise_scales(u32 to, u32 from) {
    for (int n = threadIdx.x % 32; n < tile; n += 32) {
        const TokenScales stored(from + n * token_scale_bytes);
#pragma unroll
        for (int i = 0; i < RaisedScales::words; i++) {
            const u32 two = permute_bytes(stored.word[i / 2], 0, i % 2 ? 0x4342 : 0x4140);
            store_shared(to + n * raised_token_bytes + 4 * i, e4m3_scale_halves(two << 7));
        }
    }
}

// Powers of two (e8m0) as factors of probabilities, in halves. An exponent of `floor` or below becomes 0, one by
// `reach` above it is the largest that fits beside a probability; `floor` follows the largest exponent of its group.
struct ExponentFloor {
    static constexpr u32 reach = 19, rest = 17;
    u32 negative;  // both halves -floor, as subnormal halves

    DEVICE u32 value() const { return negative & 0x7fffu; }
    DEVICE bool is_below(u32 exponent) const { return exponent > value() + reach; }
    // Of the exponents of two tokens.
    DEVICE u32 halves(u32 exponents) const { return fma_halves_relu(exponents, half_0, negative) << 10; }
    // What is to be multiplied with so that sums, which are in units of 2^(floor + 15 - 127), are as they should be.
    DEVICE float units() const { return __uint_as_float((value() + 15) << 23); }
    // Follow the largest exponent there is; what sums so far are to be multiplied with.
    DEVICE float follow(u32 exponent) {
        const u32 before = value();
        if (!is_below(exponent)) return 1;
        const u32 now = exponent > rest ? exponent - rest : 0;
        negative = 0x80008000u | now * 0x10001;
        return exponent == 255 ? not_a_number() : exp2_fast(float(before) - float(now));
    }
};
