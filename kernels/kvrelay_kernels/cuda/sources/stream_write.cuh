// A tile's sums on their way to memory: those of 16 weight rows in each warp, as matrix instructions leave them.
#pragma once
#include "elements.cuh"

#if FLOAT_OUT
using Out = float;
#else
using Out = u16;
#endif

// Lane (g, t) has rows g and g + 8 of the 16 that begin at `band`, and of each eight rows of x 2t and 2t + 1.
// bias: 16-bit elements, or null; out: [rows, n].
template <int count>
DEVICE void write_sums(const float (&sums)[count], const u16* bias, Out* out, int rows, int n, int band) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float added[2] = {0, 0}, ignored;
#pragma unroll
    for (int half = 0; half < 2; half++)
        if (const int at = band + g + 8 * half; bias && at < n) widen(added[half], ignored, __ldg(bias + at));
#pragma unroll
    for (int j = 0; j < count / 4; j++) {
        if (8 * j >= rows) return;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float x = sums[4 * j + 2 * half] + added[half], y = sums[4 * j + 2 * half + 1] + added[half];
#if FLOAT_OUT
            const int row = 8 * j + 2 * t, at = band + g + 8 * half;
            if (at < n && row < rows) out[u64(row) * n + at] = x;
            if (at < n && row + 1 < rows) out[u64(row + 1) * n + at] = y;
#else
            const u32 pair = transpose_halves(pack<bfloat>(x, y));  // neighbours in the weight's rows
            const int row = 8 * j + g, at = band + 2 * t + 8 * half;
            u16* to = out + u64(row) * n + at;
            if (row >= rows) continue;
            if (n % 2 == 0 && at < n) {
                *reinterpret_cast<u32*>(to) = pair;
            } else {
                if (at < n) to[0] = u16(pair);
                if (at + 1 < n) to[1] = u16(pair >> 16);
            }
#endif
        }
    }
}
