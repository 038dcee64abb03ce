// Sums on their way to memory, as matrix instructions leave them.
#pragma once
#include "elements.cuh"

#if FLOAT_OUT
using Out = float;
#else
using Out = u16;
#endif

// Of eight rows of x from 8 j on, by the 16 weight rows that begin at `band`: lane (g, t) has rows g and g + 8 of the
// weight, 2t and 2t + 1 of x. Weight rows from `end` on are none. bias: 16-bit elements, or null; out: [rows, n].
DEVICE void write_eight(const float (&sums)[4], const u16* bias, Out* out, int rows, int n, int band, int end, int j) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float added = 0, ignored;
        if (const int at = band + g + 8 * half; bias && at < end) widen(added, ignored, __ldg(bias + at));
        const float x = sums[2 * half] + added, y = sums[2 * half + 1] + added;
#if FLOAT_OUT
        const int row = 8 * j + 2 * t, at = band + g + 8 * half;
        if (at < end && row < rows) out[u64(row) * n + at] = x;
        if (at < end && row + 1 < rows) out[u64(row + 1) * n + at] = y;
#else
        const u32 pair = transpose_halves(pack<bfloat>(x, y));  // neighbours in the weight's rows
        const int row = 8 * j + g, at = band + 2 * t + 8 * half;
        u16* to = out + u64(row) * n + at;
        if (n % 2 == 0 && at < end && row < rows) *reinterpret_cast<u32*>(to) = pair;
        if (n % 2 && at < end && row < rows) to[0] = u16(pair);
        if (n % 2 && at + 1 < end && row < rows) to[1] = u16(pair >> 16);
#endif
    }
}
