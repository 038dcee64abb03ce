// Rows of K or V -> codes, scale and bias of each group, in the roundings of quant/affine.py and quant/scaled.py.
// Eight elements lie in a lane, a row in neighbouring lanes, and every lane of the warp takes part.
#pragma once
#include "cache_format.cuh"

// Eight codes, a scale and a bias as they are stored.
struct Coded {
    u64 codes;
    u32 scale, bias;
};

constexpr int group_lanes = group / 8;
static_assert(bits % 4 == 0 || head_dim % 32 == 0, "four lanes together fill words");
static_assert(levels != Levels::e4m3 || scale_kind == Scales::e8m0, "a quotient has to be an exact product");

DEVICE u64 gather_codes(const u32 (&code)[8]) {
    u64 word = 0;
#pragma unroll
    for (int k = 0; k < 8; k++) word |= u64(code[k]) << bits * k;
    return word;
}

// x / divisor, correctly rounded, with an approximate reciprocal: the remainder of a first quotient is exact, and as a
// half has few bits, no quotient by one lies so near to the middle of two floats that the error left over matters
// (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990).
DEVICE float divide_by_half(float x, float divisor, float reciprocal) {
    const float first = __fmul_rn(x, reciprocal);
    return __fmaf_rn(__fmaf_rn(-first, divisor, x), reciprocal, first);
}

// The nearest integer of what is at most 2^22 and not negative; halves go to even. From 2^23 on floats are integers.
DEVICE u32 nearest_integer(float x) { return __float_as_uint(__fadd_rn(x, 8388608.0f)) & 0x7fffffu; }

// Steps above the group's minimum.
DEVICE Coded quantize_steps(const float (&x)[8]) {
    float low = x[0], high = x[0];
#pragma unroll
    for (int k = 1; k < 8; k++) low = min_or_nan(low, x[k]), high = max_or_nan(high, x[k]);
#pragma unroll
    for (int step = 1; step < group_lanes; step *= 2) {
        low = min_or_nan(low, __shfl_xor_sync(every_lane, low, step));
        high = max_or_nan(high, __shfl_xor_sync(every_lane, high, step));
    }
    constexpr float top = (1 << bits) - 1;
    const u32 affine = pack<false>(__fdiv_rn(__fsub_rn(high, low), top), low);
    const float scale = low_half(affine), bias = high_half(affine);
    const float reciprocal = __fdividef(1, scale), most = __fmul_rn(top, scale);
    u32 code[8];
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const float above = fminf(fmaxf(__fsub_rn(x[k], bias), 0.0f), most);
        code[k] = nearest_integer(divide_by_half(above, scale, reciprocal));
    }
    return {scale > 0 && scale < infinity() ? gather_codes(code) : 0, affine & 0xffff, affine >> 16};
}

// The largest element of a group over the largest number, so that nothing is cut off.
DEVICE float largest_size(const float (&x)[8]) {
    float most = fabsf(x[0]);
#pragma unroll
    for (int k = 1; k < 8; k++) most = max_or_nan(most, fabsf(x[k]));
#pragma unroll
    for (int step = 1; step < group_lanes; step *= 2)
        most = max_or_nan(most, __shfl_xor_sync(every_lane, most, step));
    return __fdiv_rn(most, levels == Levels::e4m3 ? e4m3_largest : magnitude(7));
}

// The root of a group's mean square. Squares are added to those half a group, then a quarter and so on behind them:
// lanes that meet divide up their sums as long as they have several, and then fetch those of the others.
DEVICE float root_mean_square(const float (&x)[8]) {
    float sum[8];
#pragma unroll
    for (int k = 0; k < 8; k++) sum[k] = __fmul_rn(x[k], x[k]);
    int held = 8;
#pragma unroll
    for (int step = group_lanes / 2; step > 0; step /= 2) {
        if (held == 1) {
            sum[0] = __fadd_rn(sum[0], __shfl_xor_sync(every_lane, sum[0], step));
            continue;
        }
        held /= 2;
        const bool upper = threadIdx.x & step;
#pragma unroll
        for (int k = 0; k < held; k++) {
            const float given = upper ? sum[k] : sum[k + held], kept = upper ? sum[k + held] : sum[k];
            sum[k] = __fadd_rn(kept, __shfl_xor_sync(every_lane, given, step));
        }
    }
#pragma unroll
    for (int step = group_lanes / 2; step > 0 && step >= group_lanes / 8; step /= 2)
#pragma unroll
        for (int k = 0; k < held; k++) sum[k] = __fadd_rn(sum[k], __shfl_xor_sync(every_lane, sum[k], step));
#pragma unroll
    for (; held > 1; held /= 2)
#pragma unroll
        for (int k = 0; k < held / 2; k++) sum[k] = __fadd_rn(sum[k], sum[k + held / 2]);
    return __fsqrt_rn(__fmul_rn(sum[0], 1.0f / group));
}

// The numbers nearest to the elements over their group's scale.
DEVICE Coded quantize_numbers(const float (&x)[8]) {
    const float size = levels == Levels::codebook ? root_mean_square(x) : largest_size(x);
    const u32 stored = encode_scale<scale_kind>(size);
    const float scale = decode_scale<scale_kind>(stored), divisor = scale == 0 ? 1 : scale;
    u32 code[8];
    u64 codes;
    if constexpr (levels == Levels::e4m3) {
        const float factor = __uint_as_float(254 - stored << 23);  // the reciprocal of a power of two
        u32 pair[4];
#pragma unroll
        for (int k = 0; k < 8; k += 2) {
            const float a = __fmul_rn(x[k], factor), b = __fmul_rn(x[k + 1], factor);
            pair[k / 2] = converts_e4m3 ? e4m3_pair(a, b) : encode_e4m3(a) | encode_e4m3(b) << 8;
        }
        codes = u64(pair[2] | pair[3] << 16) << 32 | (pair[0] | pair[1] << 16);
    } else {
        const Edges<table_bits> edges(divisor);
#pragma unroll
        for (int k = 0; k < 8; k++) code[k] = edges.encode(x[k]);
        codes = gather_codes(code);
    }
    return {scale < infinity() ? codes : 0, stored, 0};
}

DEVICE Coded quantize(const float (&x)[8]) {
    if constexpr (levels == Levels::steps) return quantize_steps(x);
    else return quantize_numbers(x);
}

// Codes to `row`, which begins with the head's first element; this lane has those from `d` on, stored where `mine`.
// Where they fill no word, each of four lanes but the last adds what the next one has to its own.
DEVICE void store_codes(u64 codes, u8* row, int d, bool mine) {
    if constexpr (bits == 8) {
        if (mine) *reinterpret_cast<uint2*>(row + d) = {u32(codes), u32(codes >> 32)};
    } else if constexpr (bits == 4) {
        if (mine) *reinterpret_cast<u32*>(row + d / 2) = u32(codes);
    } else {
        constexpr int own = 8 * bits, word = own / 3 * 4;
        const int place = d / 8 % 4, next = (threadIdx.x + 1) % 32;
        u64 other = __shfl_sync(every_lane, u32(codes), next);
        if constexpr (own > 32) other |= u64(__shfl_sync(every_lane, u32(codes >> 32), next)) << 32;
        const u64 whole = codes >> (word - own) * place | other << own - (word - own) * place;
        if (!mine || place == 3) return;
        u8* to = row + d / 32 * 4 * bits + place * word / 8;
        if constexpr (word == 64) *reinterpret_cast<uint2*>(to) = {u32(whole), u32(whole >> 32)};
        else *reinterpret_cast<u32*>(to) = u32(whole);
    }
}
