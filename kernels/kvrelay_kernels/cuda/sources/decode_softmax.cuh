// The arithmetic of one warp: scores, probabilities and sums on tensor cores, straight from codes.
#pragma once
#include "decode_queries.cuh"

// One warp's queries and its running softmax. Tokens are rows of the scores' products and queries their columns; values'
// dimensions are rows of theirs and queries columns again. So a lane (g = lane / 4, t = lane % 4) holds scores of tokens
// g and g + 8 and sums, all for queries 2t and 2t + 1 (and 8 more).
struct Softmax : Queries {
    Code code;
    float sum[query_halves][steps][4];     // of probability * value
    float total[query_halves][2];          // of probabilities
    float offset[query_halves][2];         // probability = 2^(score * scale_log2 + offset)
    float limit[query_halves][2];          // a score above this moves the offset
    ExponentFloor floors[groups];          // where scales are powers of two

    DEVICE explicit Softmax(u32 memory) : code(memory + table_at) {}

    DEVICE void reset() {
#pragma unroll
        for (int j = 0; j < groups; j++) floors[j].negative = 0x80008000u;
#pragma unroll
        for (int m = 0; m < query_halves; m++) {
            for (int i = 0; i < 2; i++) total[m][i] = 0, offset[m][i] = 0, limit[m][i] = -infinity();
#pragma unroll
            for (int i = 0; i < steps; i++) sum[m][i][0] = sum[m][i][1] = sum[m][i][2] = sum[m][i][3] = 0;
        }
    }

    // Row address for load_matrices(): 16 tokens from 16 * i on, two 16-byte units from `chunk` on.
    DEVICE static u32 matrix_at(int i, int chunk) {
        const u32 lane = threadIdx.x & 31, at = (lane & 15) * row_bytes + lane / 16 * 16 + chunk * 16;
        if constexpr (row_bytes % 64 == 0) return i * 16 * row_bytes + swizzled(at);
        return swizzled(i * 16 * row_bytes + at);
    }

    DEVICE void scores_of(float (&score)[2][query_halves][2], u32 keys, u32 scales, int subtile) const {
        const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
        float product[query_halves][sum_groups][4];
        u32 factor[2][chunks];  // of the codes of one token in one chunk, which a lane has of one group
        if constexpr (scaled_codes) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const RaisedScales scale(scales + (h * 8 + g) * raised_token_bytes);
#pragma unroll
                for (int c = 0; c < chunks; c++) factor[h][c] = permute_bytes(scale.word[c], 0, t < 2 ? 0x1010 : 0x3232);
            }
        }
#pragma unroll
        for (int c = 0; c + 1 < chunks; c += 2) {
            u32 word[4];
            load_matrices(word, keys + matrix_at(subtile, c));
            u32 a[2][2][pairs];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                keys_of(a[h][0], word[h], factor[h][c]);
                keys_of(a[h][1], word[2 + h], factor[h][c + 1]);
            }
            const u32 *first = a[0][0], *second = a[1][0];
#pragma unroll
            for (int i = 0; i < pairs; i++)
                apply_key(product, c * pairs / 2 + i, first[2 * i], second[2 * i], first[2 * i + 1], second[2 * i + 1]);
        }
        if constexpr (chunks % 2) {
            u32 word[2];
            load_matrices(word, keys + matrix_at(subtile, chunks - 1));
            u32 a[2][pairs];
#pragma unroll
            for (int h = 0; h < 2; h++) keys_of(a[h], word[h], factor[h][chunks - 1]);
#pragma unroll
            for (int i = 0; i < pairs / 2; i++)
                apply_key(product, (chunks - 1) * pairs / 2 + i, a[0][2 * i], a[1][2 * i], a[0][2 * i + 1], a[1][2 * i + 1]);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const u32 at = scales + (h * 8 + g) * token_scale_bytes;
            if constexpr (coded && !scaled_codes) {
                scale_scores(score[h], product, h, at);
            } else {
#pragma unroll
                for (int m = 0; m < query_halves; m++)
#pragma unroll
                    for (int i = 0; i < 2; i++) score[h][m][i] = product[m][0][2 * h + i];
            }
        }
    }

    DEVICE void keys_of(u32 (&pair)[pairs], u32 word, u32 factor) const {
        code.keys(pair, word);
        scale_pairs(pair, factor);
    }
    DEVICE void halves_of(u32 (&pair)[pairs], u32 word, u32 factor) const {
        code.halves(pair, word);
        scale_pairs(pair, factor);
    }
    DEVICE static void scale_pairs(u32 (&pair)[pairs], u32 factor) {
        if constexpr (scaled_codes)
#pragma unroll
            for (int i = 0; i < pairs; i++) pair[i] = multiply_halves(pair[i], factor);
    }

    DEVICE void scale_scores(float (&score)[query_halves][2], const float (&product)[query_halves][sum_groups][4], int h,
                             u32 scales) const {
        const TokenScales scale(scales), shift(scales + (affine ? scale_bytes : 0));
#pragma unroll
        for (int m = 0; m < query_halves; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float s = 0;
#pragma unroll
                for (int j = 0; j < sum_groups; j++) {
                    if constexpr (affine) s += shift.of(j) * q_sum[m][j][i];
                    s += scale.of(j) * product[m][j][2 * h + i];
                }
                score[m][i] = s;
            }
    }

    DEVICE void apply_key(float (&product)[query_halves][sum_groups][4], int step, u32 a0, u32 a1, u32 a2, u32 a3) const {
        constexpr int span = head_dim / sum_groups;
        const int j = 16 * step / span;
#pragma unroll
        for (int m = 0; m < query_halves; m++) {
            float(&c)[4] = product[m][j];
            if (16 * step % span == 0) c[0] = c[1] = c[2] = c[3] = 0;
            multiply<bfloat_product>(c, a0, a1, a2, a3, q[step][m], q[step][query_halves + m]);
        }
    }

    // Hide keys past a query's own position or before its window.
    DEVICE static void mask(float (&score)[2][query_halves][2], const Arguments& a, const Work& s, int key0) {
        const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int m = 0; m < query_halves; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int last = s.piece.length - rows + (s.first_query + 2 * t + i + 8 * m) / heads_per_kv;
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int key = key0 + 8 * h + g;
                    if (key > last || (a.window > 0 && key <= last - a.window)) score[h][m][i] = -infinity();
                }
            }
    }

    // Over all tokens that a warp holds of a query.
    DEVICE static float highest(float x) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(every_lane, x, step));
        return x;
    }

    // Move the offsets so that the largest probability is 2^7. Rare: scores rise above all before only now and then.
    DEVICE void move_offsets(const float (&top)[query_halves][2], float scale_log2) {
#pragma unroll
        for (int m = 0; m < query_halves; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float peak = highest(top[m][i]);
                if (peak <= limit[m][i]) continue;
                const float moved = 7 - peak * scale_log2;
                const float factor = limit[m][i] == -infinity() ? 0 : exp2_fast(moved - offset[m][i]);
                offset[m][i] = moved;
                limit[m][i] = peak + 4 / scale_log2;
                total[m][i] *= factor;
#pragma unroll
                for (int k = 0; k < steps; k++) sum[m][k][i] *= factor, sum[m][k][2 + i] *= factor;
            }
    }

    // One stage of the ring: `tile` tokens from key0 on.
    DEVICE void attend(const Arguments& a, const Work& s, u32 stage, u32 scales, int key0) {
        constexpr int token_at = scaled_codes ? raised_token_bytes : token_scale_bytes;
        constexpr int v_scales = scaled_codes ? tile * raised_token_bytes : v_scales_at;
        float score[subtiles][2][query_halves][2];
        const bool edge = key0 + tile > s.piece.length - rows + 1 || (a.window > 0 && key0 < s.piece.length - a.window);
#pragma unroll
        for (int i = 0; i < subtiles; i++) {
            scores_of(score[i], stage, scales + i * 16 * token_at, i);
            if (edge) mask(score[i], a, s, key0 + 16 * i);
        }
        float top[query_halves][2];
        bool above = false;
#pragma unroll
        for (int m = 0; m < query_halves; m++)
#pragma unroll
            for (int k = 0; k < 2; k++) {
                top[m][k] = fmaxf(score[0][0][m][k], score[0][1][m][k]);
#pragma unroll
                for (int i = 1; i < subtiles; i++) top[m][k] = fmaxf(top[m][k], fmaxf(score[i][0][m][k], score[i][1][m][k]));
                above |= top[m][k] > limit[m][k];
            }
        if (__any_sync(every_lane, above)) move_offsets(top, a.scale_log2);
        if constexpr (scale_kind == Scales::e8m0) raise_floors(stage + v_at, scales + v_scales_at);
#pragma unroll
        for (int i = 0; i < subtiles; i++)
            add_values(score[i], stage + v_at, scales + v_scales + i * 16 * token_at, i, a.scale_log2);
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
                    p[h][m][i] = exp2_fast(p[h][m][i] * scale_log2 + offset[m][i]);
                    total[m][i] += p[h][m][i];
                }
                // From two queries of a token to two tokens of a query: the other operand of values' products.
                const u32 both = pack<bfloat_product>(p[h][m][0], p[h][m][1]);
                high[h][m] = transpose_halves(both);
                // Eight bits of a probability are too few; what bfloat16 cuts off goes through a product of its own.
                if constexpr (bfloat_product)
                    low[h][m] = transpose_halves(pack<true>(p[h][m][0] - low_bfloat(both), p[h][m][1] - high_bfloat(both)));
            }

        u32 weight[2][query_halves][sum_groups], factor[2][chunks];
        weigh(weight, high, scales);
        if constexpr (affine) add_biases(high, scales + scale_bytes);
        if constexpr (scaled_codes) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const u32 at = scales + (h * 8 + 2 * t) * raised_token_bytes;
                const RaisedScales first(at), second(at + raised_token_bytes);
#pragma unroll
                for (int c = 0; c < chunks; c++) factor[h][c] = permute_bytes(first.word[c], second.word[c], lane < 16 ? 0x5410 : 0x7632);
            }
        }
#pragma unroll
        for (int c = 0; c + 1 < chunks; c += 2) {
            u32 word[4];
            load_transposed(word, values + matrix_at(subtile, c));
            if constexpr (coded) {
                apply_values(c, word[0], word[1], weight, factor);
                apply_values(c + 1, word[2], word[3], weight, factor);
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
            apply_values(chunks - 1, word[0], word[1], weight, factor);
        }
    }

    // Probabilities of pairs of tokens as each group of dimensions is multiplied with them: times its scales.
    DEVICE void weigh(u32 (&weight)[2][query_halves][sum_groups], const u32 (&high)[2][query_halves], u32 scales) const {
        const int t = threadIdx.x & 3;
        u32 stored[2][sum_groups];
        if constexpr (coded && !scaled_codes) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const PairScales scale(scales + (h * 8 + 2 * t) * token_scale_bytes);
#pragma unroll
                for (int j = 0; j < sum_groups; j++) stored[h][j] = scale.both(j);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int j = 0; j < sum_groups; j++) {
                if constexpr (scale_kind == Scales::e8m0) stored[h][j] = floors[j].halves(stored[h][j]);
#pragma unroll
                for (int m = 0; m < query_halves; m++)
                    weight[h][m][j] = coded && !scaled_codes ? multiply_halves(high[h][m], stored[h][j]) : high[h][m];
            }
    }

    // Exponents far from 0 would leave the range of a half: they are taken from floors, which only seldom have to move.
    DEVICE void raise_floors(u32 values, u32 scales) {
        const int lane = threadIdx.x & 31;
        bool above = false;
#pragma unroll
        for (int n = lane; n < tile; n += 32)
#pragma unroll
            for (int j = 0; j < groups; j++) above |= floors[j].is_below(load_shared_byte(scales + n * groups + j));
        if (!__any_sync(every_lane, above)) return;
#pragma unroll
        for (int j = 0; j < groups; j++) {
            u32 largest = 0;
#pragma unroll 1
            for (int n = lane; n < tile; n += 32) {
                const u32 at = scales + n * groups + j, exponent = load_shared_byte(at);
                // A group of zeros has the scale 1, which says nothing of how large the others are.
                if (exponent == 127 && is_zero(values, n, j)) store_shared_byte(at, 0);
                else largest = max(largest, exponent);
            }
#pragma unroll
            for (int step = 16; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(every_lane, largest, step));
            const float factor = floors[j].follow(largest);
#pragma unroll
            for (int i = j * group / 16; i < (j + 1) * group / 16; i++)
#pragma unroll
                for (int m = 0; m < query_halves; m++)
#pragma unroll
                    for (int k = 0; k < 4; k++) sum[m][i][k] *= factor;
        }
        __syncwarp();
    }

    // Whether all codes of a token's group stand for zero.
    DEVICE static bool is_zero(u32 rows_at, int token, int index) {
        constexpr int words = group * width / 32;
        u32 any = 0;
#pragma unroll 1
        for (int i = 0; i < words; i++) any |= load_shared(rows_at + swizzled(token * row_bytes + (index * words + i) * 4));
        return (any & (width == 8 ? 0x7f7f7f7fu : 0x77777777u)) == 0;
    }

    // Beside (p * scale) * code, p * bias: two products into one sum, so that the two, which nearly cancel, never grow
    // apart over a long sequence. 2^-24, the unit of codes, is shared between p and the bias.
    DEVICE void add_biases(const u32 (&high)[2][query_halves], u32 biases) {
        const int t = threadIdx.x & 3;
        const PairScales first(biases + 2 * t * token_scale_bytes), second(biases + (8 + 2 * t) * token_scale_bytes);
        u32 low[2][query_halves];
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int m = 0; m < query_halves; m++) low[h][m] = multiply_halves(high[h][m], half_14);
#pragma unroll
        for (int j = 0; j < groups; j++) {
            const u32 bias0 = first.both(j), bias1 = second.both(j);
            const u32 even0 = multiply_halves(bias0, half_10), even1 = multiply_halves(bias1, half_10);
            const u32 odd0 = uneven ? multiply_halves(bias0, half_6) : even0;
            const u32 odd1 = uneven ? multiply_halves(bias1, half_6) : even1;
#pragma unroll
            for (int i = j * group / 16; i < (j + 1) * group / 16; i++)
#pragma unroll
                for (int m = 0; m < query_halves; m++)
                    multiply<false>(sum[m][i], even0, odd0, even1, odd1, low[0][m], low[1][m]);
        }
    }

    DEVICE void apply_values(int chunk, u32 first, u32 second, const u32 (&weight)[2][query_halves][sum_groups],
                             const u32 (&factor)[2][chunks]) {
        constexpr int span = head_dim / sum_groups;
        u32 a[2][pairs];
        halves_of(a[0], first, factor[0][chunk]);
        halves_of(a[1], second, factor[1][chunk]);
#pragma unroll
        for (int i = 0; i < pairs / 2; i++) {
            const int step = chunk * pairs / 2 + i, j = 16 * step / span;
#pragma unroll
            for (int m = 0; m < query_halves; m++)
                multiply<false>(sum[m][step], a[0][2 * i], a[0][2 * i + 1], a[1][2 * i], a[1][2 * i + 1],
                                weight[0][m][j], weight[1][m][j]);
        }
    }

    // Bring this warp's sums to its team's common peak and lay them out as [query][dimension].
    DEVICE void meet(float* area, float* peaks, float* sums) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, first = warp / team * team, g = lane / 4, t = lane % 4;
        float peak[query_halves][2];
#pragma unroll
        for (int m = 0; m < query_halves; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                peak[m][i] = limit[m][i] == -infinity() ? -1e30f : -offset[m][i];
                if (g == 0) peaks[warp * query_tile + 2 * t + i + 8 * m] = peak[m][i];
            }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < query_halves; m++) {
            float factor[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int query = 2 * t + i + 8 * m;
                float most = peaks[first * query_tile + query], all = total[m][i];
#pragma unroll
                for (int w = 1; w < team; w++) most = fmaxf(most, peaks[(first + w) * query_tile + query]);
                factor[i] = exp2_fast(peak[m][i] - most);
#pragma unroll
                for (int step = 4; step < 32; step *= 2) all += __shfl_xor_sync(every_lane, all, step);
                if (g == 0) sums[warp * query_tile + query] = all * factor[i];
            }
            const float low = factor[0], high = factor[1];
            float* to = area + (warp * tile_queries + 2 * t + 8 * m) * area_pitch;
#pragma unroll
            for (int i = 0; i < steps; i++) {
                const int d = output_dim(i, g);
                const float units = scale_kind == Scales::e8m0 ? floors[16 * i / group].units() : 1;
                const float even = units * code_units, odd = units * odd_pair_units;
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
