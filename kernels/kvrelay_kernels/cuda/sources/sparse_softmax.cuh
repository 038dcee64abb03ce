// What a warp does with the scores of 16 rows, as the tensor cores leave them in registers: a thread has rows lane / 4
// and + 8, and of each eight columns the two from 2 * (lane % 4) on. It has n scores of 2 n keys.
#pragma once
#include "sparse_work.cuh"

// A row's maximum moves only when a score exceeds it by 2^8: until then sums grow past one, which costs floating
// point nothing, and the output is not scaled. Each row decides alone, so its bits do not depend on its neighbours.
constexpr float tolerance = 8;
constexpr float lowest = -1e30f;  // finite, so that a row without keys meets no NaN

struct Softmax {
    float peak[2], sum[2];  // of the thread's rows: in log2 units; of this thread's columns alone
    int position[2], low[2];
    int prefix;

    Softmax() = default;
    // Of rows `row` and `row + 8` of the item, which see keys from `low0` and `low1` on.
    DEVICE Softmax(const Item& item, int row, int low0, int low1) : low{low0, low1}, prefix(item.prefix) {
#pragma unroll
        for (int r = 0; r < 2; r++) peak[r] = lowest, sum[r] = 0, position[r] = item.position + row + 8 * r;
    }

    // Hides the scores of keys that a row does not see.
    template <int n>
    DEVICE void mask(float (&s)[n], int first_key) const {
        const int key = first_key + threadIdx.x % 4 * 2;
        if (__any_sync(every_lane, low[0] > first_key || low[1] > first_key)) {
            hide(s, [&](int r, int column) { return column < low[r] - key && column >= prefix - key; });
        }
        hide(s, [&](int r, int column) { return column > position[r] - key; });
    }

    template <int n, class Hidden>
    static DEVICE void hide(float (&s)[n], Hidden hidden) {
#pragma unroll
        for (int i = 0; i < n; i++)
            if (hidden(i / 2 % 2, i / 4 * 8 + i % 2)) s[i] = -infinity();
    }

    // Scores of row `r` -> exponents, the running maximum taken off. Whether it moved for any row of the warp; then
    // `factor` is what the row's earlier sums and outputs are to be multiplied by.
    template <int r, int n>
    DEVICE bool find_exponents(float (&s)[n], float (&factor)[2], float scale) {
        float highest = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
        for (int j = 1; j < n / 4; j++) highest = fmaxf(highest, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
        highest *= scale;
        const bool moves = __any_sync(every_lane, highest > peak[r] + tolerance);
        factor[r] = 1;
        if (moves) {
            highest = fmaxf(highest, __shfl_xor_sync(every_lane, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(every_lane, highest, 2));
            const bool rises = highest > peak[r] + tolerance;
            factor[r] = rises ? exp2_fast(peak[r] - highest) : 1.0f;
            if (rises) peak[r] = highest;
        }
#pragma unroll
        for (int j = 0; j < n / 4; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) s[4 * j + 2 * r + e] = fmaf(s[4 * j + 2 * r + e], scale, -peak[r]);
        }
        return moves;
    }

    // Exponents of row `r` -> probabilities.
    template <int r, int n>
    DEVICE void raise(float (&s)[n], const float (&factor)[2]) {
        float added = 0;
#pragma unroll
        for (int j = 0; j < n / 4; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float& x = s[4 * j + 2 * r + e];
                x = exp2_fast(x);
                added += x;
            }
        }
        sum[r] = fmaf(sum[r], factor[r], added);
    }

    // One over the whole sum of a row; zero for a row that saw no key.
    DEVICE float inverse(int r) const {
        float total = sum[r] + __shfl_xor_sync(every_lane, sum[r], 1);
        total += __shfl_xor_sync(every_lane, total, 2);
        return total == 0 ? 0 : 1 / total;
    }
};

// Probabilities of row `r` as its part of the left operand of the second product.
template <int r, int n>
DEVICE void pack_operand(u32 (&p)[n / 2], const float (&s)[n]) {
#pragma unroll
    for (int j = 0; j < n / 4; j++) p[2 * j + r] = pack<bfloat>(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]);
}
