// Split-K decode attention straight on the paged, quantized cache.
//
// Every warp runs alone on tiles of `tile` tokens: asynchronous copies fill its own ring of stages, matrix
// instructions take the codes (scales and biases stay outside the products), and the warps of a thread block meet only
// at the end of a head's range. Pieces of a head that lie in several thread blocks are added by the last to arrive.
#include "decode_shape.cuh"
#include "schedule.cuh"

extern __shared__ __align__(128) u8 memory[];

struct Arguments {
    const u16* q;       // [sequences * rows, kv_heads * heads_per_kv, head_dim]
    const u8* cache;    // one layer of the arena: [blocks, block_bytes]
    const int* tables;  // [sequences, table_stride]
    const int* lengths; // [sequences], the query rows included
    u16* out;           // as q
    float* partials;    // [2 * gridDim.x, query_tile, head_dim]
    float2* stats;      // [2 * gridDim.x, query_tile]: peak (log2), sum
    int* arrivals;      // [sequences * kv_heads * query_tiles], zero between launches
    int table_stride, sequences;
    float scale_log2;   // softmax scale * log2(e), times the unit of scores
    int window;         // 0: none
};

// The part of one head's blocks that falls into this thread block's range.
struct Segment {
    int sequence, head, first_query;
    int length, first_block, tiles;
    int begin, end, stop;  // units: the whole head's, and where this part ends
};

DEVICE Segment locate(const Arguments& a, const int* firsts, const int* lengths, int unit, int range_end) {
    Segment s;
    s.sequence = find_sequence(firsts, a.sequences, unit);
    s.length = lengths[s.sequence];
    const Range seen = visible_blocks(s.length, rows, a.window, block_tokens);
    const int blocks = seen.end - seen.begin, within = unit - firsts[s.sequence];
    const int which = divide(within, blocks);
    s.head = which / query_tiles;
    s.first_query = which % query_tiles * query_tile;
    s.begin = firsts[s.sequence] + which * blocks;
    s.end = s.begin + blocks;
    s.stop = min(s.end, range_end);
    s.first_block = seen.begin + unit - s.begin;
    const int tokens = min((s.stop - unit) * block_tokens, s.length - s.first_block * block_tokens);
    s.tiles = (tokens + tile - 1) / tile;
    return s;
}

// Asynchronous copies of this warp's tiles, `stages - 1` ahead of their use.
struct Feed {
    u32 ring;        // shared address
    int fill, drain; // byte offsets of stages in the ring
    int next, block; // the tile to fetch next, and where it lies in the arena

    DEVICE void look_up(const Arguments& a, const Segment& s) {
        if (next < s.tiles)
            block = __ldg(a.tables + (u64)s.sequence * a.table_stride + s.first_block + u32(next) / tiles_per_block);
    }

    template <bool whole>
    DEVICE void fetch(const Arguments& a, const Segment& s, int token, int valid) const {
        const int lane = threadIdx.x & 31;
        const u32 to = ring + fill;
        const u8* from = a.cache + (u64)u32(block) * block_bytes;
        const int first_row = s.head * block_tokens + token;
        const u8* row = from + (first_row * row_bytes + lane * 16);
        constexpr int pieces = tile * chunks;  // of 16 bytes, in the K rows of a tile
        repeat<(pieces + 31) / 32>([&](auto i) {
            constexpr int first = 32 * i.value, at = first * 16;
            const int n = first + lane;
            if (pieces % 32 && n >= pieces) return;
            if constexpr (32 % chunks == 0) {  // all lanes step from row to row together
                const u32 lane_to = to + lane / chunks * pitch + lane % chunks * 16;
                copy_both<whole, first / chunks * pitch, at>(lane_to, row, valid * row_bytes - n * 16);
            } else {
                copy_both<whole, 0, at>(to + n / chunks * pitch + n % chunks * 16, row, valid * row_bytes - n * 16);
            }
        });
        if constexpr (coded) {
            constexpr int each = coded ? scale_bytes / 16 : 1, all = 4 * each;  // 16-byte pieces: of a frame, of all
            const u8* scale_row = from + first_row * groups * 2;
#pragma unroll
            for (int i = 0; i < (all + 31) / 32; i++) {
                const int n = i * 32 + lane, which = n / each, piece = n % each;
                const int frame = which == 0 ? k_scales : which == 1 ? k_biases : which == 2 ? v_scales : v_biases;
                if (all % 32 && n >= all) continue;
                const u8* source = scale_row + (frame + piece * 16);
                if constexpr (whole) copy16<scales_at, 0>(to + n * 16, source);
                else copy16<scales_at, 0>(to + n * 16, source, valid * groups * 2 - piece * 16);
            }
        }
    }

    // The same piece of the K rows and of the V rows.
    template <bool whole, int to_offset, int from_offset>
    DEVICE static void copy_both(u32 to, const u8* from, int valid) {
        if constexpr (whole) {
            copy16<to_offset, k_codes + from_offset>(to, from);
            copy16<v_at + to_offset, v_codes + from_offset>(to, from);
        } else {
            copy16<to_offset, k_codes + from_offset>(to, from, valid);
            copy16<v_at + to_offset, v_codes + from_offset>(to, from, valid);
        }
    }

    DEVICE void advance(const Arguments& a, const Segment& s) {
        if (next < s.tiles) {
            const int token = u32(next) % tiles_per_block * tile;
            const int valid = s.length - (s.first_block * block_tokens + next * tile);
            if (valid >= tile) fetch<true>(a, s, token, tile);
            else fetch<false>(a, s, token, valid);  // what lies past the end is not even defined: read as zero
            next += warps;
            look_up(a, s);
        }
        close_copies();
        fill = fill + stage_bytes == stages * stage_bytes ? 0 : fill + stage_bytes;
    }

    DEVICE void begin(const Arguments& a, const Segment& s, int warp) {
        fill = drain = 0;
        next = warp;
        look_up(a, s);
        for (int i = 0; i < stages - 1; i++) advance(a, s);
    }
};

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

    // Queries in the order of dimensions that code_pairs() gives.
    DEVICE void load(const Arguments& a, const Segment& s) {
        const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int m = 0; m < query_halves; m++) {
            const int n = s.first_query + g + 8 * m;
            const bool real = n < queries;
            const u64 row = (u64)s.sequence * rows + n / heads_per_kv;
            const u16* from = a.q + ((row * kv_heads + s.head) * heads_per_kv + n % heads_per_kv) * head_dim;
            const u32* words = reinterpret_cast<const u32*>(from);
            if constexpr (bits == 16) {
#pragma unroll
                for (int i = 0; i < steps; i++) {
                    q[i][m] = real ? __ldg(words + 8 * i + t) : 0;
                    q[i][query_halves + m] = real ? __ldg(words + 8 * i + 4 + t) : 0;
                }
            } else if constexpr (bits == 8) {
#pragma unroll
                for (int i = 0; i < steps; i++) {
                    uint2 w = {0, 0};
                    if (real) w = __ldg(reinterpret_cast<const uint2*>(words) + 4 * i + t);
                    q[i][m] = pair_of(w.x, w.y, 0x5410);
                    q[i][query_halves + m] = pair_of(w.x, w.y, 0x7632);
                }
            } else {
#pragma unroll
                for (int i = 0; i < steps; i += 2) {
                    uint4 w = {0, 0, 0, 0};
                    if (real) w = __ldg(reinterpret_cast<const uint4*>(words) + 2 * i + t);
                    q[i][m] = pair_of(w.x, w.z, 0x5410);
                    q[i][query_halves + m] = multiply_halves(pair_of(w.x, w.z, 0x7632), half_4);
                    q[i + 1][m] = pair_of(w.y, w.w, 0x5410);
                    q[i + 1][query_halves + m] = multiply_halves(pair_of(w.y, w.w, 0x7632), half_4);
                }
            }
            if constexpr (coded) {
#pragma unroll
                for (int i = 0; i < groups; i++) {
                    float x = 0;
#pragma unroll
                    for (int j = i * group / 16; j < (i + 1) * group / 16; j++) {
                        x += low_half(q[j][m]) + high_half(q[j][m]);
                        const float odd = low_half(q[j][query_halves + m]) + high_half(q[j][query_halves + m]);
                        x += odd * (code_units / odd_pair_units<bits>);
                    }
                    x += __shfl_xor_sync(every_lane, x, 1);
                    q_sum[m][i] = (x + __shfl_xor_sync(every_lane, x, 2)) / code_units;
                }
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

    DEVICE void scores_of(float (&score)[2][query_halves][2], u32 keys, u32 scales) const {
        const int lane = threadIdx.x & 31, t = lane % 4;
        float product[2][groups][4];
        const u32 at = keys + (lane & 15) * pitch + lane / 16 * 16;
#pragma unroll
        for (int c = 0; c + 1 < chunks; c += 2) {
            u32 word[4];
            load_matrices(word, at + 16 * c);
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
            load_matrices(word, at + 16 * (chunks - 1));
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
    DEVICE static void mask(float (&score)[2][query_halves][2], const Arguments& a, const Segment& s, int key0) {
        const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int m = 0; m < query_halves; m++) {
            const int last = s.length - rows + (s.first_query + g + 8 * m) / heads_per_kv;
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

    // 16 tokens: `keys` and `values` are shared addresses of their rows, `scales` of their K scales.
    DEVICE void attend(const Arguments& a, const Segment& s, u32 keys, u32 values, u32 scales, int key0, bool edge) {
        const int lane = threadIdx.x & 31, t = lane % 4;
        float p[2][query_halves][2];
        scores_of(p, keys, scales);
        if (edge) mask(p, a, s, key0);

        float top[query_halves];
        bool above = false;
#pragma unroll
        for (int m = 0; m < query_halves; m++) {
            top[m] = fmaxf(fmaxf(p[0][m][0], p[0][m][1]), fmaxf(p[1][m][0], p[1][m][1]));
            above |= top[m] > limit[m];
        }
        if (__any_sync(every_lane, above)) move_offsets(top, a.scale_log2);

        u32 high[2][query_halves], low[2][query_halves];
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int m = 0; m < query_halves; m++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    p[h][m][i] = exp2_fast(p[h][m][i] * a.scale_log2 + offset[m]);
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

        const u32 at = values + (lane & 15) * pitch + lane / 16 * 16;
#pragma unroll
        for (int c = 0; c + 1 < chunks; c += 2) {
            u32 word[4];
            load_transposed(word, at + 16 * c);
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
            load_transposed(word, at + 16 * (chunks - 1));
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

DEVICE void write_pair(const Arguments& a, const Segment& s, int query, int d, float2 x) {
    const int n = s.first_query + query;
    if (n >= queries) return;
    const u64 row = (u64)s.sequence * rows + n / heads_per_kv;
    u16* to = a.out + ((row * kv_heads + s.head) * heads_per_kv + n % heads_per_kv) * head_dim + d;
    *reinterpret_cast<u32*>(to) = pack<bfloat>(x.x, x.y);
}

// The thread block's result for a segment: output if the segment is a whole head, otherwise a partial result.
DEVICE void conclude(const Arguments& a, const Segment& s, const Cut& cut, const float* area, const float* peaks,
                     const float* sums) {
    const int me = blockIdx.x;
    const int first = cut.owner(s.begin), last = cut.owner(s.end - 1), pieces = last - first + 1;
    const int slot = 2 * me + (s.begin > cut.range(me).begin);
    constexpr int work = tile_queries * head_dim / 2;
    for (int n = threadIdx.x; n < work; n += warps * 32) {
        const int query = n / (head_dim / 2), d = n % (head_dim / 2) * 2;
        float2 x = {0, 0};
        float sum = 0;
#pragma unroll
        for (int w = 0; w < warps; w++) {
            const float2 y = *reinterpret_cast<const float2*>(area + (w * tile_queries + query) * area_pitch + d);
            x.x += y.x, x.y += y.y;
            sum += sums[w * query_tile + query];
        }
        if (pieces == 1) {
            write_pair(a, s, query, d, {x.x / sum, x.y / sum});
        } else {
            *reinterpret_cast<float2*>(a.partials + ((u64)slot * query_tile + query) * head_dim + d) = x;
            if (d == 0) {
                float peak = peaks[query];
                for (int w = 1; w < warps; w++) peak = fmaxf(peak, peaks[w * query_tile + query]);
                a.stats[slot * query_tile + query] = {peak, sum};
            }
        }
    }
    if (pieces == 1) return;

    __shared__ int arrived_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int* arrivals = a.arrivals + (s.sequence * kv_heads + s.head) * query_tiles + s.first_query / query_tile;
        arrived_last = atomicAdd(arrivals, 1) == pieces - 1;
        if (arrived_last) *arrivals = 0;
    }
    __syncthreads();
    if (!arrived_last) return;
    __threadfence();
    const int first_slot = 2 * first + (s.begin > cut.range(first).begin);
    for (int n = threadIdx.x; n < work; n += warps * 32) {
        const int query = n / (head_dim / 2), d = n % (head_dim / 2) * 2;
        float peak = -1e30f, sum = 0;
        float2 x = {0, 0};
#pragma unroll 8
        for (int i = 0; i < pieces; i++) {
            const int from = (i == 0 ? first_slot : 2 * (first + i)) * query_tile + query;
            const float2 stat = load_fresh(a.stats + from);
            const float2 y = load_fresh(reinterpret_cast<const float2*>(a.partials + (u64)from * head_dim + d));
            const float higher = fmaxf(peak, stat.x);
            const float keep = exp2_fast(peak - higher), add = exp2_fast(stat.x - higher);
            x.x = x.x * keep + y.x * add, x.y = x.y * keep + y.y * add;
            sum = sum * keep + stat.y * add;
            peak = higher;
        }
        write_pair(a, s, query, d, {x.x / sum, x.y / sum});
    }
}

extern "C" __global__ void __launch_bounds__(warps * 32, BLOCKS_PER_SM)
decode_attention(const u16* q, const u8* cache, const int* tables, const int* lengths, u16* out,
                 float* partials, float2* stats, int* arrivals, int table_stride, int sequences, float scale_log2,
                 int window) {
    const Arguments a{q, cache, tables, lengths, out, partials, stats, arrivals,
                      table_stride, sequences, coded ? scale_log2 * code_units : scale_log2, window};
    const int warp = threadIdx.x / 32;
    float* area = reinterpret_cast<float*>(memory + area_at);
    float* peaks = reinterpret_cast<float*>(memory + peaks_at);
    float* sums = reinterpret_cast<float*>(memory + sums_at);
    int* firsts = reinterpret_cast<int*>(memory + firsts_at);
    int* lengths_here = firsts + sequences + 1;

    if (warp == 0) count_units(firsts, lengths_here, lengths, sequences, rows, window, block_tokens, kv_heads * query_tiles);
    __syncthreads();
    constexpr int sequence_words = rows * kv_heads * heads_per_kv * head_dim / 2;
    for (int s = blockIdx.x; s < a.sequences; s += gridDim.x)  // a slot without tokens answers zeros
        if (firsts[s] == firsts[s + 1])
            for (int n = threadIdx.x; n < sequence_words; n += warps * 32)
                reinterpret_cast<u32*>(a.out)[(u64)s * sequence_words + n] = 0;

    const Cut cut(firsts[a.sequences], gridDim.x);
    const Range range = cut.range(blockIdx.x);
    if (range.begin == range.end) return;

    Segment s = locate(a, firsts, lengths_here, range.begin, range.end);
    Feed feed;
    feed.ring = shared_address(memory) + warp * stages * stage_bytes;
    feed.begin(a, s, warp);
    Softmax softmax;
    while (true) {
        softmax.load(a, s);
        softmax.reset();
        const int key_start = s.first_block * block_tokens;
        for (int n = warp; n < s.tiles; n += warps) {
            wait_copies<stages - 2>();
            __syncwarp();
            feed.advance(a, s);
            const u32 stage = feed.ring + feed.drain;
            const int key0 = key_start + n * tile;
            const bool edge = key0 + tile > s.length - rows + 1 || (a.window > 0 && key0 < s.length - a.window);
#pragma unroll
            for (int i = 0; i < tile / 16; i++)
                softmax.attend(a, s, stage + i * 16 * pitch, stage + v_at + i * 16 * pitch,
                               stage + scales_at + i * 16 * groups * 2, key0 + 16 * i, edge);
            feed.drain = feed.drain + stage_bytes == stages * stage_bytes ? 0 : feed.drain + stage_bytes;
        }
        __syncwarp();
        const Segment done = s;
        const bool more = s.stop < range.end;
        if (more) {
            s = locate(a, firsts, lengths_here, s.stop, range.end);
            feed.begin(a, s, warp);
        }
        softmax.meet(area, peaks, sums);
        conclude(a, done, cut, area, peaks, sums);
        if (!more) return;
    }
}
