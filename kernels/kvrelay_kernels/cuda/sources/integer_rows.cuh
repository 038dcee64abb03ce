// A few rows of x as 16-bit integers in shared memory, the other operand of the matrix instruction for bytes.
//
// Columns that are multiplied at once share a step, a 32639th of the largest magnitude among them. A value is the nearest
// of its multiples, 256 high + low, both of them signed bytes (`cpu/integers.py` has the same in one word). So an operand's
// eight columns are four pairs: for one row of x, four steps of it, for two rows two of each, for four rows one of each.
#pragma once
#include "coded_matrix.cuh"
#include "elements.cuh"

constexpr int x_rows = ROWS;      // 1, 2 or 4
constexpr int cluster = CLUSTER;  // thread blocks that round as much of x each, for all of them
constexpr int step_columns = group < 32 ? 16 : 32;
constexpr int span_steps = 4, span_columns = span_steps * step_columns;
constexpr int at_once = span_steps / x_rows;  // steps of a row that are pairs of one operand
constexpr int passes = x_rows;                // operands of a span
constexpr int pair_bytes = 2 * step_columns, operand_bytes = span_steps * pair_bytes;
constexpr int lane_words = step_columns / 16;  // of an operand
constexpr float largest_integer = 32639, least_magnitude = 1e-30f;  // what is smaller by far becomes zero
// A float beside it is rounded to an integer, whose bits are the lowest; 128 more, so that the low byte is never negative.
constexpr float beside = 12582912 + 128;

struct IntegerRows {
    u32 parts, steps;  // where they lie: [span][pass][pair][high, low][columns], and [span][pass][pair] of two floats

    // All of the `threads`: rows of x, `given` of them, and zeros, behind their k columns too, up to `spans`. unit: the
    // weight's. What a thread asked for it rounds itself, where it came to.
    DEVICE void fill(const u16* x, int given, int k, float unit, int spans, int threads) const {
        const int eights = spans * span_columns / 8 / cluster, from = (cluster > 1 ? cluster_rank() : 0) * eights;
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int row = 0; row < x_rows; row++)
#pragma unroll 1
            for (int i = threadIdx.x; i < eights; i += threads) {
                const int column = 8 * (from + i);
                const bool there = row < given && column < k;
                const u8* source = reinterpret_cast<const u8*>(there ? x + u64(row) * k + column : x);
                copy16(parts + pair_of(row, column) * pair_bytes + column % step_columns * 2, source, there ? 16 : 0);
            }
        close_copies();
        wait_copies<0>();
#pragma unroll 1
        for (int row = 0; row < x_rows; row++)
#pragma unroll 1
            for (int i = threadIdx.x; i - lane < eights; i += threads) round(row, 8 * (from + i), unit, i < eights);
    }

    // Which pair it is of all that a row has at a column.
    DEVICE static u32 pair_of(u32 row, u32 column) {
        const u32 step = column / step_columns;
        return (step / span_steps * passes + step % span_steps / at_once) * span_steps + row * at_once + step % at_once;
    }

    // Eight columns of a row; the lanes beside have the others of their step.
    DEVICE void round(u32 row, u32 column, float unit, bool there) const {
        const u32 pair = pair_of(row, column), first = column % step_columns, to = parts + pair * pair_bytes + first;
        uint4 v = {};
        if (there) load_shared4(v.x, v.y, v.z, v.w, to + first);
        float x[8], top[8];
        widen(x, v);
#pragma unroll
        for (int i = 0; i < 8; i++) top[i] = fabsf(x[i]);
#pragma unroll
        for (int half = 4; half > 0; half /= 2)
#pragma unroll
            for (int i = 0; i < half; i++) top[i] = max_or_nan(top[i], top[i + half]);
        float largest = max_or_nan(top[0], least_magnitude);
#pragma unroll
        for (int mask = 1; mask < step_columns / 8; mask *= 2)
            largest = max_or_nan(largest, __shfl_xor_sync(every_lane, largest, mask));
        const float step = largest * (1 / largest_integer), inverse = inverse_fast(step);
        u32 words[8], sum = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) words[i] = __float_as_uint(__fmaf_rn(x[i], inverse, beside)), sum += words[i];
#pragma unroll
        for (int mask = 1; mask < step_columns / 8; mask *= 2) sum += __shfl_xor_sync(every_lane, sum, mask);
        u32 high[2], low[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {  // in the order of columns that a word of codes has
            const u32 even = permute_bytes(words[4 * i], words[4 * i + 2], 0x5140);
            const u32 odd = permute_bytes(words[4 * i + 1], words[4 * i + 3], 0x5140);
            high[i] = permute_bytes(even, odd, 0x7632), low[i] = permute_bytes(even, odd, 0x5410) ^ 0x80808080u;
        }
        if (!there) return;
        share(to, high[0], high[1]);
        share(to + step_columns, low[0], low[1]);
        if (first == 0) {
            const float one = step * unit, total = float(int(sum - step_columns * __float_as_uint(beside)));
            share(steps + pair * 8, __float_as_uint(one), __float_as_uint(total * one * bias_unit));
        }
    }

    // Two words for all thread blocks of the cluster.
    DEVICE static void share(u32 address, u32 a, u32 b) {
        store_shared2(address, a, b);
        if constexpr (cluster > 1) {
#pragma unroll
            for (int i = 1; i < cluster; i++) store_remote2(address, a, b, (cluster_rank() + i) % cluster);
        }
    }
};
