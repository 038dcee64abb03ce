// x @ weight.T for 1 to 64 rows of x, at the speed of reading the weight: codes of 4 or 8 bits, or 16-bit elements.
//
// The weight's rows are rows of the matrix instruction, those of x its columns. Eight warps cut the columns of the same
// weight rows into eight parts, each in order; their sums are added in order. So a result depends neither on how many
// rows there are nor on how they are tiled. Weights come straight into registers, a few units ahead, and on into the
// next rows' units while results are added up.
#include "few_rows_unit.cuh"
#include "stream_write.cuh"

constexpr int tiles = TILES;      // of 16 weight rows, that a thread block works on at once
constexpr int columns = COLUMNS;  // of 8 rows of x
constexpr int depth = DEPTH;      // units on their way
constexpr int parts = 8;
constexpr int band_rows = tiles * tile_rows, row_slots = 8 * columns;

using Sums = float[tiles][columns][4];

// One lane's place in x. What it reads past the last row is the last row: its results go nowhere.
struct ActivationsPlace {
    const u16* rows[columns];
    int left;  // columns from here on, to the end of a row

    DEVICE ActivationsPlace(const u16* x, int count, int k, int unit) {
        const int lane = threadIdx.x & 31, column = unit * unit_columns + lane % 4 * run;
        left = k - column;
#pragma unroll
        for (int j = 0; j < columns; j++) rows[j] = x + (u64)min(8 * j + lane / 4, count - 1) * k + column;
    }
    DEVICE void advance(int units) {
        left -= units * unit_columns;
#pragma unroll
        for (int j = 0; j < columns; j++) rows[j] += units * unit_columns;
    }
};

// Adds the product of the unit so many units behind a place in x.
DEVICE void add_unit(Sums& total, const WeightUnit (&weight)[tiles], const ActivationsPlace& x, int behind, u32 nibbles) {
    const u32 ones = nibbles ^ (0x000f000fu ^ sum_operand);
#pragma unroll
    for (int i = 0; i < unit_groups; i++) {
        u32 a[tiles][group_steps][planes][4];
#pragma unroll
        for (int m = 0; m < tiles; m++)
#pragma unroll
            for (int s = 0; s < group_steps; s++)
#pragma unroll
                for (int p = 0; p < planes; p++) weight[m].operand(a[m][s][p], i * group_steps + s, p, nibbles);
#pragma unroll
        for (int j = 0; j < columns; j++) {
            u32 b[2 * group_steps];
            const int ahead = behind * unit_columns + i * (unit_columns / unit_groups);
            fetch_activations(b, x.rows[j] + ahead, x.left - ahead);
            float sum[4] = {0, 0, 0, 0};
            if constexpr (coded && !floats)
#pragma unroll
                for (int s = 0; s < group_steps; s++)
                    multiply<bfloat>(sum, ones, ones, ones, ones, b[2 * s], b[2 * s + 1]);
#pragma unroll
            for (int m = 0; m < tiles; m++) {
                float product[planes][4] = {};
#pragma unroll
                for (int s = 0; s < group_steps; s++)
#pragma unroll
                    for (int p = 0; p < planes; p++) {
                        const u32(&w)[4] = a[m][s][p];
                        float(&c)[4] = scaled ? product[p] : total[m][j];
                        multiply<bfloat>(c, w[0], w[1], w[2], w[3], b[2 * s], b[2 * s + 1]);
                    }
                if constexpr (scaled)
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        const Factors f = weight[m].factors[2 * i + c / 2];
                        const float shift = bias_of(f) * sum_unit - zero_sums * scale_of(f);
                        if constexpr (planes == 2) product[0][c] += 16 * product[1][c];
                        if constexpr (!floats) total[m][j][c] += shift * sum[c];
                        total[m][j][c] += scale_of(f) * product[0][c];
                    }
            }
        }
    }
}

using Merge = float[parts][row_slots][band_rows + 4];

DEVICE void hand_in(Merge& merge, const Sums& total) {
    const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < tiles; m++)
#pragma unroll
        for (int j = 0; j < columns; j++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                merge[threadIdx.x / 32][8 * j + 2 * t + c % 2][tile_rows * m + g + 8 * (c / 2)] = total[m][j][c];
}

// The sum of a row of x with a weight row, counted from the band's first one.
DEVICE float whole_sum(const Merge& merge, int row, int at) {
    float x = merge[0][row][at];
#pragma unroll
    for (int p = 1; p < parts; p++) x += merge[p][row][at];
    return x;
}

// Two of them a thread. of_rows: scales, where there is one a row; bias: 16-bit elements, or null.
DEVICE void add_parts(const Merge& merge, const Factors* of_rows, const u16* bias, Out* out, int rows, int n, int first,
                      float unit) {
    constexpr int pairs = band_rows / 2;
    for (int i = threadIdx.x; i < pairs * min(rows, row_slots); i += blockDim.x) {
        const int row = i / pairs, tile = i % pairs / 8 * tile_rows, g = i % 8;
        float sums[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = tile + g + 8 * half;
            sums[half] = unit * row_scale(of_rows, min(first + at, n - 1)) * whole_sum(merge, row, at);
        }
        write_two(sums[0], sums[1], bias, out, n, first + tile, n, g, row);
    }
}

// nibbles: 0x000f000f; as a constant, the compiler would put it into a register again before each use. unit: the weight's.
extern "C" __global__ void __launch_bounds__(32 * parts, BLOCKS_PER_SM)
few_rows(const u16* x, const u8* data, const Factors* factors, const u16* bias, int rows, int n, int k, u32 nibbles, float unit, Out* out) {
    release_dependents();
    __shared__ Merge merge;
    const int units = (k + unit_columns - 1) / unit_columns, bands = (n + band_rows - 1) / band_rows;
    const int part = threadIdx.x / 32, begin = part * units / parts, end = (part + 1) * units / parts;
    WeightPlace place[tiles];
    WeightUnit ring[depth][tiles];
    const auto move = [&](int band) {
#pragma unroll
        for (int m = 0; m < tiles; m++) place[m].move(data, factors, n, k, band * tiles + m, begin);
    };
    const auto fetch = [&](int behind) {
#pragma unroll
        for (int m = 0; m < tiles; m++) place[m].fetch(ring[behind][m], behind);
    };
    move(blockIdx.x);
#pragma unroll
    for (int d = 0; d < depth; d++)
        if (begin + d < end) fetch(d);
    await_producers();
    for (int band = blockIdx.x; band < bands; band += gridDim.x) {
        Sums total = {};
        ActivationsPlace activations(x, rows, k, begin);
        for (int left = end - begin; left > 0; left -= depth) {
            int next = left - depth;  // units of the next round and those behind it
            if (next > 0) {
#pragma unroll
                for (int m = 0; m < tiles; m++) place[m].advance(depth);
            } else {
                move(band + gridDim.x);
                next = band + gridDim.x < bands ? end - begin : 0;
            }
#pragma unroll
            for (int d = 0; d < depth; d++) {
                if (d < left) add_unit(total, ring[d], activations, d, nibbles);
                if (d < next) fetch(d);
            }
            activations.advance(depth);
        }
        hand_in(merge, total);
        __syncthreads();
        add_parts(merge, factors, bias, out, rows, n, band * band_rows, product_unit * unit);
        __syncthreads();
    }
}
