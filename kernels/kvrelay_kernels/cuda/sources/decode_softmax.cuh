// The arithmetic of one warp: scores, probabilities and sums on tensor cores, straight from codes.
#pragma once
#include "decode_feed.cuh"

// One warp's queries and its running softmax. A lane (g = lane / 4, t = lane % 4) holds the scores of query g (and
// g + 8) for tokens 2t, 2t + 1 of each eight, and sums for queries 2t, 2t + 1.
struct Softmax {
    u32 q[steps][2 * query_halves];
    float q_sum[query_halves][groups];
    float sum[query_halves][steps][4];   // of probability * value
    float total[query_halves];           // of probabilities
    float offset[query_halves];          // probability = 2^(score * scale_log2 + offset)
    float limit[query_halves];           // a score above this moves the offset

    DEVICE void reset() {
#pragma unroll
        for (int m = 0; m < query_halves; m++) {
            total[m] = 0, offset[m] = 0, limit[m] = -infinity();
#pragma unroll
            for (int i = 0; i < steps; i++) sum[m][i][0] = sum[m][i][1] = sum[m][i][2] = sum[m][i][3] = 0;
        }
    }

    DEVICE static u32 pair_of(u32 low, u32 high, u32 selector) {
        const u32 pair = permute_bytes(low, high, selector);
        if constexpr (bfloat && coded) return pack<false>(low_bfloat(pair), high_bfloat(pair));
        else return pair;
    }

    // Queries as they lie in memory; they are needed only once the first keys are there.
    DEVICE void fetch(const Arguments& a, const Work& s) {
        const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int m = 0; m < query_halves; m++) {
            const int n = s.first_query + g + 8 * m;
            const u64 row = (u64)s.piece.sequence * rows + n / heads_per_kv;
            const u32* from = reinterpret_cast<const u32*>(
                a.q + ((row * kv_heads + s.head) * heads_per_kv + n % heads_per_kv) * head_dim);
#pragma unroll
            for (int i = 0; i < steps; i++) q[i][m] = q[i][query_halves + m] = 0;
            if (n >= queries) continue;
#pragma unroll
            for (int i = 0; i < steps; i++) {
                if constexpr (bits == 16) {
                    q[i][m] = __ldg(from + 8 * i + t);
                    q[i][query_halves + m] = __ldg(from + 8 * i + 4 + t);
                } else if constexpr (bits == 8) {
                    const uint2 w = __ldg(reinterpret_cast<const uint2*>(from) + 4 * i + t);
                    q[i][m] = w.x, q[i][query_halves + m] = w.y;
                } else if (i % 2 == 0) {
                    const uint4 w = __ldg(reinterpret_cast<const uint4*>(from) + 2 * i + t);
                    q[i][m] = w.x, q[i][query_halves + m] = w.y, q[i + 1][m] = w.z, q[i + 1][query_halves + m] = w.w;
                }
            }
        }
    }

    // In the order of dimensions that code_pairs() gives, as halves where keys are codes.
    DEVICE void prepare() {
        if constexpr (!coded) return;
#pragma unroll
        for (int m = 0; m < query_halves; m++) {
#pragma unroll
            for (int i = 0; i < steps; i++) {
                u32& even = q[i][m];
                u32& odd = q[i][query_halves + m];
                if constexpr (bits == 8) {
                    const u32 x = even, y = odd;
                    even = pair_of(x, y, 0x5410), odd = pair_of(x, y, 0x7632);
                } else if (i % 2 == 0) {
                    u32& next_even = q[i + 1][m];
                    u32& next_odd = q[i + 1][query_halves + m];
                    const u32 x = even, y = odd, z = next_even, w = next_odd;
                    even = pair_of(x, z, 0x5410), odd = multiply_halves(pair_of(x, z, 0x7632), half_4);
                    next_even = pair_of(y, w, 0x5410), next_odd = multiply_halves(pair_of(y, w, 0x7632), half_4);
                }
            }
#pragma unroll
            for (int i = 0; i < groups; i++) {
                float x = 0;
#pragma unroll
                for (int j = i * group / 16; j < (i + 1) * group / 16; j++) {
                    const float odd = low_half(q[j][query_halves + m]) + high_half(q[j][query_halves + m]);
                    x += low_half(q[j][m]) + high_half(q[j][m]) + odd * (code_units / odd_pair_units<bits>);
                }
                x += __shfl_xor_sync(every_lane, x, 1);
                q_sum[m][i] = (x + __shfl_xor_sync(every_lane, x, 2)) / code_units;
            }
        }
    }

    // Scale words of tokens 2t, 2t + 1 of eight: half number token * groups + group.
    DEVICE static void scale_words(u32 (&w)[groups], u32 at) {
        if constexpr (groups == 2) load_shared2(w[0], w[1], at);
        else if constexpr (groups % 4 == 0) {
#pragma unroll
            for (int i = 0; i < groups; i += 4) load_shared4(w[i], w[i + 1], w[i + 2], w[i + 3], at + 4 * i);
        } else {
#pragma unroll
            for (int i = 0; i < groups; i++) w[i] = load_shared(at + 4 * i);
        }
    }
    DEVICE static float scale_of(const u32 (&w)[groups], int token, int index) {
        const int n = token * groups + index;
        return n % 2 ? high_half(w[n / 2]) : low_half(w[n / 2]);
    }
    // The halves of both tokens for one group, as a pair.
    DEVICE static u32 scale_pair(const u32 (&w)[groups], int index) {
        const int n = groups + index;
        return permute_bytes(w[index / 2], w[n / 2], (n % 2 ? 0x7600 : 0x5400) + (index % 2 ? 0x32 : 0x10));
    }

    // Row address for load_matrices(): 16 tokens from 16 * i on, two 16-byte units from `chunk` on.
    DEVICE static u32 matrix_at(int i, int chunk) {
        const u32 lane = threadIdx.x & 31, at = (lane & 15) * row_bytes + lane / 16 * 16 + chunk * 16;
        if constexpr (row_bytes % 64 == 0) return i * 16 * row_bytes + swizzled(at);
        return swizzled(i * 16 * row_bytes + at);
    }

    DEVICE void scores_of(float (&score)[2][query_halves][2], u32 keys, u32 scales, int subtile) const {
        const int lane = threadIdx.x & 31, t = lane % 4;
        float product[2][groups][4];
#pragma unroll
        for (int c = 0; c + 1 < chunks; c += 2) {
            u32 word[4];
            load_matrices(word, keys + matrix_at(subtile, c));
#pragma unroll
            for (int h = 0; h < 2; h++) {
                u32 b[2][pairs];
                code_pairs<bits>(b[0], word[h]);
                code_pairs<bits>(b[1], word[2 + h]);
                const u32* pair = b[0];
#pragma unroll
                for (int i = 0; i < pairs; i++) apply_key(product[h], c * pairs / 2 + i, pair[2 * i], pair[2 * i + 1]);
            }
        }
        if constexpr (chunks % 2) {
            u32 word[2];
            load_matrices(word, keys + matrix_at(subtile, chunks - 1));
#pragma unroll
            for (int h = 0; h < 2; h++) {
                u32 b[pairs];
                code_pairs<bits>(b, word[h]);
#pragma unroll
                for (int i = 0; i < pairs / 2; i++)
                    apply_key(product[h], (chunks - 1) * pairs / 2 + i, b[2 * i], b[2 * i + 1]);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 scale[groups], shift[groups];
            if constexpr (coded) {
                scale_words(scale, scales + (h * 8 + 2 * t) * groups * 2);
                scale_words(shift, scales + scale_bytes + (h * 8 + 2 * t) * groups * 2);
            }
#pragma unroll
            for (int m = 0; m < query_halves; m++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if constexpr (coded) {
                        float s = 0;
#pragma unroll
                        for (int j = 0; j < groups; j++) {
                            s += scale_of(shift, i, j) * q_sum[m][j];
                            s += scale_of(scale, i, j) * product[h][j][2 * m + i];
                        }
                        score[h][m][i] = s;
                    } else {
                        score[h][m][i] = product[h][0][2 * m + i];
                    }
                }
        }
    }

    DEVICE void apply_key(float (&product)[groups][4], int step, u32 b0, u32 b1) const {
        const int j = coded ? 16 * step / group : 0;
        if (coded ? 16 * step % group == 0 : step == 0) product[j][0] = product[j][1] = product[j][2] = product[j][3] = 0;
        if constexpr (query_halves == 1) multiply<bfloat_product>(product[j], q[step][0], 0, q[step][1], 0, b0, b1);
        else multiply<bfloat_product>(product[j], q[step][0], q[step][1], q[step][2], q[step][3], b0, b1);
    }

    // Hide keys past a query's own position or before its window.
    DEVICE static void mask(float (&score)[2][query_halves][2], const Arguments& a, const Work& s, int key0) {
        const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int m = 0; m < query_halves; m++) {
            const int last = s.piece.length - rows + (s.first_query + g + 8 * m) / heads_per_kv;
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int key = key0 + 8 * h + 2 * t + i;
                    if (key > last || (a.window > 0 && key <= last - a.window)) score[h][m][i] = -infinity();
                }
        }
    }

    // Move the offsets so that the largest probability is 2^7. Rare: scores rise above all before only now and then.
    DEVICE void move_offsets(const float (&top)[query_halves], float scale_log2) {
        const int t = threadIdx.x & 3;
#pragma unroll
        for (int m = 0; m < query_halves; m++) {
            float peak = fmaxf(top[m], __shfl_xor_sync(every_lane, top[m], 1));
            peak = fmaxf(peak, __shfl_xor_sync(every_lane, peak, 2));
            float factor = 1;
            if (peak > limit[m]) {
                const float moved = 7 - peak * scale_log2;
                factor = limit[m] == -infinity() ? 0 : exp2_fast(moved - offset[m]);
                offset[m] = moved;
                limit[m] = peak + 4 / scale_log2;
            }
            total[m] *= factor;
            const float low = __shfl_sync(every_lane, factor, 8 * t), high = __shfl_sync(every_lane, factor, 8 * t + 4);
#pragma unroll
            for (int i = 0; i < steps; i++) {
                sum[m][i][0] *= low, sum[m][i][1] *= high;
                sum[m][i][2] *= low, sum[m][i][3] *= high;
            }
        }
    }

    // One stage of the ring: `tile` tokens from key0 on.
    DEVICE void attend(const Arguments& a, const Work& s, u32 stage, u32 scales, int key0) {
        float score[subtiles][2][query_halves][2];
        const bool edge = key0 + tile > s.piece.length - rows + 1 || (a.window > 0 && key0 < s.piece.length - a.window);
#pragma unroll
        for (int i = 0; i < subtiles; i++) {
            scores_of(score[i], stage, scales + i * 16 * groups * 2, i);
            if (edge) mask(score[i], a, s, key0 + 16 * i);
        }
        float top[query_halves];
        bool above = false;
#pragma unroll
        for (int m = 0; m < query_halves; m++) {
            top[m] = score[0][0][m][0];
#pragma unroll
            for (int i = 0; i < subtiles; i++)
#pragma unroll
                for (int h = 0; h < 2; h++) top[m] = fmaxf(top[m], fmaxf(score[i][h][m][0], score[i][h][m][1]));
            above |= top[m] > limit[m];
        }
        if (__any_sync(every_lane, above)) move_offsets(top, a.scale_log2);
#pragma unroll
        for (int i = 0; i < subtiles; i++)
            add_values(score[i], stage + v_at, scales + i * 16 * groups * 2, i, a.scale_log2);
    }

    // Adds the values of 16 tokens, each times its probability.
    DEVICE void add_values(float (&p)[2][query_halves][2], u32 values, u32 scales, int subtile,
                           float scale_log2) {
        const int lane = threadIdx.x & 31, t = lane % 4;
        u32 high[2][query_halves], low[2][query_halves];
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int m = 0; m < query_halves; m++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    p[h][m][i] = exp2_fast(p[h][m][i] * scale_log2 + offset[m]);
                    total[m] += p[h][m][i];
                }
                high[h][m] = pack<bfloat_product>(p[h][m][0], p[h][m][1]);
                // Eight bits of a probability are too few; what bfloat16 cuts off goes through a product of its own.
                if constexpr (bfloat_product)
                    low[h][m] = pack<true>(p[h][m][0] - low_bfloat(high[h][m]), p[h][m][1] - high_bfloat(high[h][m]));
            }

        // Values: sum of (p * scale) * code + p * bias, two products into one sum, so that the two, which nearly cancel,
        // never grow apart over a long sequence. 2^-24, the unit of codes, is shared between p and the bias.
        u32 weight[2][query_halves][groups], bias[2][groups];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if constexpr (coded) {
                u32 scale[groups], shift[groups];
                scale_words(scale, scales + 2 * scale_bytes + (h * 8 + 2 * t) * groups * 2);
                scale_words(shift, scales + 3 * scale_bytes + (h * 8 + 2 * t) * groups * 2);
#pragma unroll
                for (int j = 0; j < groups; j++) bias[h][j] = scale_pair(shift, j);
#pragma unroll
                for (int m = 0; m < query_halves; m++) {
#pragma unroll
                    for (int j = 0; j < groups; j++) weight[h][m][j] = multiply_halves(high[h][m], scale_pair(scale, j));
                    low[h][m] = multiply_halves(high[h][m], half_14);
                }
            } else {
                for (int m = 0; m < query_halves; m++) weight[h][m][0] = high[h][m];
            }
        }
        if constexpr (coded) {
#pragma unroll
            for (int j = 0; j < groups; j++) {
                const u32 even0 = multiply_halves(bias[0][j], half_10), even1 = multiply_halves(bias[1][j], half_10);
                const u32 odd0 = bits == 4 ? multiply_halves(bias[0][j], half_6) : even0;
                const u32 odd1 = bits == 4 ? multiply_halves(bias[1][j], half_6) : even1;
#pragma unroll
                for (int i = j * group / 16; i < (j + 1) * group / 16; i++)
#pragma unroll
                    for (int m = 0; m < query_halves; m++)
                        multiply<false>(sum[m][i], even0, odd0, even1, odd1, low[0][m], low[1][m]);
            }
        }

#pragma unroll
        for (int c = 0; c + 1 < chunks; c += 2) {
            u32 word[4];
            load_transposed(word, values + matrix_at(subtile, c));
            if constexpr (coded) {
                apply_values(c, word[0], word[1], weight);
                apply_values(c + 1, word[2], word[3], weight);
            } else {
#pragma unroll
                for (int m = 0; m < query_halves; m++) {
                    multiply<bfloat>(sum[m][c / 2], word[0], word[2], word[1], word[3], high[0][m], high[1][m]);
                    if constexpr (bfloat)
                        multiply<true>(sum[m][c / 2], word[0], word[2], word[1], word[3], low[0][m], low[1][m]);
                }
            }
        }
        if constexpr (chunks % 2) {
            u32 word[2];
            load_transposed(word, values + matrix_at(subtile, chunks - 1));
            apply_values(chunks - 1, word[0], word[1], weight);
        }
    }

    DEVICE void apply_values(int chunk, u32 first, u32 second, const u32 (&weight)[2][query_halves][groups]) {
        u32 a[2][pairs];
        code_pairs<bits>(a[0], first);
        code_pairs<bits>(a[1], second);
#pragma unroll
        for (int i = 0; i < pairs / 2; i++) {
            const int step = chunk * pairs / 2 + i, j = 16 * step / group;
#pragma unroll
            for (int m = 0; m < query_halves; m++)
                multiply<false>(sum[m][step], a[0][2 * i], a[0][2 * i + 1], a[1][2 * i], a[1][2 * i + 1],
                                weight[0][m][j], weight[1][m][j]);
        }
    }

    // Bring this warp's sums to the thread block's common peak and lay them out as [query][dimension].
    DEVICE void meet(float* area, float* peaks, float* sums) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
        float peak[query_halves];
#pragma unroll
        for (int m = 0; m < query_halves; m++) {
            peak[m] = limit[m] == -infinity() ? -1e30f : -offset[m];
            if (t == 0) peaks[warp * query_tile + g + 8 * m] = peak[m];
        }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < query_halves; m++) {
            float highest = peaks[g + 8 * m];
#pragma unroll
            for (int w = 1; w < warps; w++) highest = fmaxf(highest, peaks[w * query_tile + g + 8 * m]);
            const float factor = exp2_fast(peak[m] - highest);
            float all = total[m] + __shfl_xor_sync(every_lane, total[m], 1);
            all += __shfl_xor_sync(every_lane, all, 2);
            if (t == 0) sums[warp * query_tile + g + 8 * m] = all * factor;
            const float low = __shfl_sync(every_lane, factor, 8 * t), high = __shfl_sync(every_lane, factor, 8 * t + 4);
            constexpr float even = coded ? code_units : 1, odd = coded ? odd_pair_units<bits> : 1;
            float* to = area + (warp * tile_queries + 2 * t + 8 * m) * area_pitch;
#pragma unroll
            for (int i = 0; i < steps; i++) {
                const int d = output_dim(i, g);
                if (2 * t + 8 * m < tile_queries) {
                    to[d] = sum[m][i][0] * (low * even);
                    to[d + output_stride] = sum[m][i][2] * (low * odd);
                }
                if (2 * t + 1 + 8 * m < tile_queries) {
                    to[area_pitch + d] = sum[m][i][1] * (high * even);
                    to[area_pitch + d + output_stride] = sum[m][i][3] * (high * odd);
                }
            }
        }
        __syncthreads();
    }
};
