// What a multiplying warpgroup does with a step's scores, as the tensor cores leave them in registers: a thread has
// rows lane / 4 and + 8 of its warp's 16, and of each eight columns the two from 2 * (lane % 4) on.
#pragma once
#include "sparse_shape.cuh"

#if HAS_WARPGROUPS
// A row's maximum moves only when a score exceeds it by 2^8: until then sums grow past one, which costs floating
// point nothing, and the output is not scaled. Each row decides alone, so its bits do not depend on its neighbours.
constexpr float tolerance = 8;
constexpr float lowest = -1e30f;  // finite, so that a row without keys meets no NaN

struct Softmax {
    float peak[2], sum[2];  // of the thread's rows: in log2 units; of this thread's columns alone
    int position[2], low[2];
    int prefix;

    DEVICE Softmax(const Item& item, const int* lows, int row) : prefix(item.prefix) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            peak[r] = lowest, sum[r] = 0;
            position[r] = item.position + row + 8 * r;
            low[r] = lows[row + 8 * r];
        }
    }

    // Hides the scores of keys that a row does not see.
    DEVICE void mask(float (&s)[step / 2], int first_key) const {
        const int key = first_key + threadIdx.x % 4 * 2;
        if (__any_sync(every_lane, low[0] > first_key || low[1] > first_key)) {
            hide(s, [&](int r, int n) { return n < low[r] - key && n >= prefix - key; });
        }
        hide(s, [&](int r, int n) { return n > position[r] - key; });
    }

    template <class Hidden>
    static DEVICE void hide(float (&s)[step / 2], Hidden hidden) {
#pragma unroll
        for (int i = 0; i < step / 2; i++)
            if (hidden(i / 2 % 2, i / 4 * 8 + i % 2)) s[i] = -infinity();
    }

    // Scores -> probabilities; `factor` is what the rows' earlier sums and outputs are to be multiplied by.
    DEVICE void apply(float (&s)[step / 2], float (&factor)[2], float scale) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float highest = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
            for (int j = 1; j < step / 8; j++) highest = fmaxf(highest, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
            highest = fmaxf(highest, __shfl_xor_sync(every_lane, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(every_lane, highest, 2)) * scale;
            const bool rises = highest > peak[r] + tolerance;
            factor[r] = rises ? exp2_fast(peak[r] - highest) : 1.0f;
            if (rises) peak[r] = highest;
            float added = 0;
#pragma unroll
            for (int j = 0; j < step / 8; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float& x = s[4 * j + 2 * r + e];
                    x = exp2_fast(fmaf(x, scale, -peak[r]));
                    added += x;
                }
            }
            sum[r] = fmaf(sum[r], factor[r], added);
        }
    }

    // One over the whole sum of a row; zero for a row that saw no key.
    DEVICE float inverse(int r) const {
        float total = sum[r] + __shfl_xor_sync(every_lane, sum[r], 1);
        total += __shfl_xor_sync(every_lane, total, 2);
        return total == 0 ? 0 : 1 / total;
    }
};

// Probabilities as the left operand of the second product.
DEVICE void pack_operand(u32 (&p)[step / 4], const float (&s)[step / 2]) {
#pragma unroll
    for (int i = 0; i < step / 4; i++) p[i] = pack<bfloat>(s[2 * i], s[2 * i + 1]);
}
#endif
