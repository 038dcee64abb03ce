// Sums on their way to memory, as matrix instructions leave them: a lane has rows g and g + 8 of each 16 of the weight.
//
// In a gated matrix these are a row of the gate and its row of up: of the two sums, in float32, becomes one number.
#pragma once
#include "activation.cuh"
#include "elements.cuh"

#if FLOAT_OUT
using Out = float;
DEVICE Out as_out(float x) { return x; }
#else
using Out = u16;
DEVICE Out as_out(float x) { return u16(pack<bfloat>(x, 0)); }
#endif

// Element `at` of a bias, or zero where there is none. Elements from `end` on are none.
DEVICE float bias_at(const u16* bias, int at, int end) {
    float value = 0, ignored;
    if (bias && at < end) widen(value, ignored, __ldg(bias + at));
    return value;
}

// Eight columns of a result of n columns from `first` on, and its eight rows from 8 j on: lane (g, t) has column g, and x
// and y of rows 2t and 2t + 1. Columns from `end` on are none.
DEVICE void write_square(float x, float y, Out* out, int rows, int n, int first, int end, int j) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#if FLOAT_OUT
    const int row = 8 * j + 2 * t, at = first + g;
    if (at < end && row < rows) out[u64(row) * n + at] = x;
    if (at < end && row + 1 < rows) out[u64(row + 1) * n + at] = y;
#else
    const u32 pair = transpose_halves(pack<bfloat>(x, y));  // neighbours in a row
    const int row = 8 * j + g, at = first + 2 * t;
    u16* to = out + u64(row) * n + at;
    if (n % 2 == 0 && at < end && row < rows) *reinterpret_cast<u32*>(to) = pair;
    if (n % 2 && at < end && row < rows) to[0] = u16(pair);
    if (n % 2 && at + 1 < end && row < rows) to[1] = u16(pair >> 16);
#endif
}

// Of eight rows of x from 8 j on, by the 16 weight rows that begin at `band`: lane (g, t) has rows g and g + 8 of the
// weight, 2t and 2t + 1 of x. Of n weight rows, those from `end` on are none. bias: 16-bit elements, or null; out:
// [rows, n], or [rows, n / 2] of a gated matrix.
DEVICE void write_eight(const float (&sums)[4], const u16* bias, Out* out, int rows, int n, int band, int end, int j) {
    const int g = threadIdx.x % 32 / 4;
    const float low = bias_at(bias, band + g, end), high = bias_at(bias, band + g + 8, end);
    const float x[2] = {sums[0] + low, sums[1] + low}, y[2] = {sums[2] + high, sums[3] + high};
    if constexpr (gated) {
        write_square(activate(x[0]) * y[0], activate(x[1]) * y[1], out, rows, n / 2, band / 2, end / 2, j);
    } else {
        write_square(x[0], x[1], out, rows, n, band, end, j);
        write_square(y[0], y[1], out, rows, n, band + 8, end, j);
    }
}

// The same of one row of x, by a lane that has its sums with weight rows band + g and band + g + 8.
DEVICE void write_two(float low, float high, const u16* bias, Out* out, int n, int band, int end, int g, int row) {
    const int at = band + g;
    low += bias_at(bias, at, end), high += bias_at(bias, at + 8, end);
    if constexpr (gated) {
        if (at < end) out[u64(row) * (n / 2) + band / 2 + g] = as_out(activate(low) * high);
    } else {
        if (at < end) out[u64(row) * n + at] = as_out(low);
        if (at + 8 < end) out[u64(row) * n + at + 8] = as_out(high);
    }
}
