// x @ weight.T for 1 to 4 rows of x and a weight of 4- or 8-bit codes, at the speed of reading the codes.
//
// Codes are an operand of the matrix instruction for bytes as they lie in shared memory, but for a mask; x, rounded to
// 16-bit integers, is the other one. Its products are exact. Of one row, four steps of columns are multiplied at once,
// each beside zeros, so that every lane has the sum of its own step; scales and biases come to it afterwards.
//
// A thread block has whole rows of the weight, a band of tiles at a time: a warp for a few of them, or several that take
// spans of columns by turns. One thread keeps a ring of codes full, from before the kernels ahead have ended. Each thread
// block rounds x for itself, or two of them half of it for both. A sum's order depends on the weight's size and the device
// alone: four sums of every fourth step, added at the end, be there one row, two or four.
#include "integer_rows.cuh"
#include "stream_write.cuh"
#include "turn.cuh"
#include "warpgroup.cuh"

constexpr int tiles = TILES;            // of 16 weight rows in a band: an even number, or few
constexpr int warp_tiles = WARP_TILES;  // of a warp
constexpr int splits = SPLITS;          // warps that share these
constexpr int stages = STAGES, stage_spans = STAGE_SPANS;
constexpr int tile_warps = tiles / warp_tiles, consumer_warps = tile_warps * splits;
constexpr int consumers = 32 * consumer_warps, all_threads = consumers + 32;
constexpr int stage_turns = (splits + stage_spans - 1) / stage_spans;  // of stages, from one of a warp's to its next
constexpr int stage_splits = splits / stage_turns;                     // that a stage has spans for
constexpr int round_spans = stage_turns * stage_spans;                 // until each warp has had its turns
static_assert(stages % stage_turns == 0, "a place's barrier is that of the same warps each time");
static_assert(warp_tiles == 1 || tiles % 2 || warp_tiles % 2 == 0, "a warp's tiles are pairs where they lie so");
static_assert(tiles % warp_tiles == 0 && stage_turns * stage_splits == splits && stage_spans % stage_splits == 0, "an even share");

constexpr int unit_factor_bytes = unit_factors * int(sizeof(Factors));
constexpr int span_units = span_columns / unit_columns, stage_units = stage_spans * span_units;
constexpr int together = tiles % 2 ? 1 : pair_tiles;  // tiles side by side in a stage: pairs, as the weight has them, or not
constexpr int boxes = tiles % 2 ? tiles : 1;          // that bring a stage
constexpr int next_codes = together * unit_code_bytes, next_factors = together * unit_factor_bytes;  // from unit to unit
constexpr int factors_at = tiles * stage_units * unit_code_bytes;
constexpr int stage_bytes = factors_at + tiles * stage_units * unit_factor_bytes;
static_assert(stage_bytes % 128 == 0, "boxes begin at multiples of 128");

// Sums of a band: [split][tile][row of x][row of the weight].
constexpr int total_floats = splits * tiles * x_rows * tile_rows;
constexpr int totals_at = stages * stage_bytes, barriers_at = totals_at + 4 * total_floats;
constexpr int rows_at = barriers_at + 16 * stages;
static_assert(rows_at <= RING_BYTES, "what the launcher asks for, beside x");

struct Ring {
    u32 memory;

    DEVICE u32 stage(const Turn<stages>& turn) const { return memory + turn.at * stage_bytes; }
    DEVICE u32 full(const Turn<stages>& turn) const { return memory + barriers_at + turn.at * 16; }
    DEVICE u32 empty(const Turn<stages>& turn) const { return full(turn) + 8; }

    DEVICE void create() const {
        for (Turn<stages> turn; turn.phase == 0; turn.next()) {
            create_barrier(full(turn), 1);
            create_barrier(empty(turn), tile_warps * stage_splits);
        }
        publish_barriers();
    }
};

// Every so many bands belong to a thread block, with all their columns.
struct Work {
    int bands, band_stages;

    DEVICE Work(int n, int k)
        : bands((n + tiles * tile_rows - 1) / (tiles * tile_rows)),
          band_stages((k + round_spans * span_columns - 1) / (round_spans * span_columns) * stage_turns) {}
};

// What one thread asks for: whole stages, be they full or not.
struct Feed {
    const Ring& ring;
    const Work& work;
    const TensorMap &codes, &factors;
    int band = blockIdx.x, stage = 0;
    Turn<stages> turn = {};

    DEVICE bool done() const { return band >= work.bands; }
    DEVICE void ask() {
        const u32 full = ring.full(turn), to = ring.stage(turn);
        expect_bytes(full, stage_bytes);
#pragma unroll 1
        for (int i = 0; i < boxes; i++) {
            const int tile = band * tiles + i, upper = together == 1 ? tile % pair_tiles : 0;
            const int unit = stage * stage_units, pair = tile / pair_tiles;
            copy_planes_once(to + i * stage_units * unit_code_bytes, &codes, unit, pair, full, upper * (unit_code_bytes / 8));
            copy_planes_once(to + factors_at + i * stage_units * unit_factor_bytes, &factors, unit, pair, full,
                             upper * (unit_factor_bytes / 8));
        }
        turn.next();
        if (++stage == work.band_stages) stage = 0, band += gridDim.x;
    }
};

// What one lane has of a tile's codes in one pass.
struct Codes {
    static constexpr int step_words = lane_words * bits / 4;
    u32 words[at_once * step_words];

    DEVICE void load(u32 from, int pass) {
        constexpr int count = at_once * step_words, wide = count < 4 ? count : 4;
#pragma unroll
        for (int i = 0; i < count; i += wide) {
            const int at = pass * count + i;  // of a span's words of a lane, a unit of which has as many as bits
            const u32 place = from + at / bits * next_codes + at % bits / 4 * 512 + at % 4 * 4;
            if constexpr (wide == 4) load_shared4(words[i], words[i + 1], words[i + 2], words[i + 3], place);
            else if constexpr (wide == 2) load_shared2(words[i], words[i + 1], place);
            else words[i] = load_shared(place);
        }
    }
    // The operand of a step: rows g and g + 8, with 4 bits 16 times as large.
    DEVICE void operand(u32 (&a)[2 * lane_words], int step) const {
#pragma unroll
        for (int i = 0; i < 2 * lane_words; i++) {
            if constexpr (bits == 8) a[i] = words[step * step_words + i];
            else a[i] = words[step * step_words + i / 2] & (i % 2 ? 0xf0f0f0f0u : 0x0f0f0f0fu);
        }
    }
};

// Where a step's scales and biases lie behind those of a span's first.
DEVICE constexpr int factors_of(int step) {
    const int column = step * step_columns;
    return column / unit_columns * next_factors + column % unit_columns / group * (2 * int(sizeof(Factors)));
}

using Sums = float[passes][2];  // of rows g and g + 8 with pair t

// How far tile `i` of a stage lies behind its first, in units of a size; and of a warp.
DEVICE constexpr int behind(int i, int unit_bytes) {
    return i / together * (stage_units * together * unit_bytes) + i % together * unit_bytes;
}

// What a lane needs in every span.
struct Lane {
    u32 codes, factors;  // behind a stage's
    u32 part, step;      // behind those of x
    u32 own[at_once];    // all bits where the step is that of the lane's column of x
    bool speaks;

    DEVICE Lane(const IntegerRows& x, int first) {  // tile
        const u32 lane = in_register(threadIdx.x % 32), g = lane / 4, t = lane % 4;
        speaks = lane == 0;
        codes = in_register(behind(first, unit_code_bytes) + lane * 16);
        factors = in_register(factors_at + behind(first, unit_factor_bytes) + g * (unit_groups * 2 * int(sizeof(Factors))) +
                              factors_of(t % at_once));
        part = in_register(x.parts + lane * (4 * lane_words)), step = in_register(x.steps + t * 8);
#pragma unroll
        for (int i = 0; i < at_once; i++) own[i] = in_register(i == g / 2 % at_once ? every_lane : 0);
    }
};

DEVICE void add_span(Sums (&sums)[warp_tiles], const Lane& lane, u32 codes, u32 factors, int span) {
#pragma unroll
    for (int pass = 0; pass < passes; pass++) {
        u32 b[lane_words], own[at_once][lane_words], scales[2];
        const int operand = span * passes + pass;
        if constexpr (lane_words == 2) load_shared2(b[0], b[1], lane.part + operand * operand_bytes);
        else b[0] = load_shared(lane.part + operand * operand_bytes);
        load_shared2(scales[0], scales[1], lane.step + operand * (span_steps * 8));
        const float step = __uint_as_float(scales[0]), sum = __uint_as_float(scales[1]);
#pragma unroll
        for (int i = 0; i < at_once; i++)
#pragma unroll
            for (int w = 0; w < lane_words; w++) own[i][w] = at_once == 1 ? b[w] : b[w] & lane.own[i];
#pragma unroll
        for (int tile = 0; tile < warp_tiles; tile++) {
            u32 words[2 * sizeof(Factors) / 4];
            const u32 at = factors + behind(tile, unit_factor_bytes) + factors_of(pass * at_once);
            if constexpr (WIDE_FACTORS) load_shared4(words[0], words[1], words[2], words[3], at);
            else load_shared2(words[0], words[1], at);
            Codes mine;
            mine.load(codes + behind(tile, unit_code_bytes), pass);
            int c[4] = {};
#pragma unroll
            for (int i = 0; i < at_once; i++) {
                u32 a[2 * lane_words];
                mine.operand(a, i);
                multiply_bytes(c, a, own[i]);
            }
            const int whole[2] = {256 * c[0] + c[1], (256 * c[2] + c[3]) >> (bits == 4 ? 4 : 0)};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float value = __fmul_rn(float(whole[half]), step);
#if WIDE_FACTORS
                const Factors f = {words[2 * half], words[2 * half + 1]};
#else
                const Factors f = words[half];
#endif
                float& to = sums[tile][pass][half];
                to = __fmaf_rn(stored_bias(f), sum, __fmaf_rn(scale_of(f), value, to));
            }
        }
    }
}

// The sum of a row: of its four, the first two and the last two are added first.
DEVICE float add_steps(const Sums& sums, int half) {
    float part[passes];
#pragma unroll
    for (int pass = 0; pass < passes; pass++) {
        part[pass] = sums[pass][half];
#pragma unroll
        for (int mask = 1; mask < at_once; mask *= 2) part[pass] += __shfl_xor_sync(every_lane, part[pass], mask);
    }
    if constexpr (passes == 1) return part[0];
    else if constexpr (passes == 2) return part[0] + part[1];
    else return (part[0] + part[1]) + (part[2] + part[3]);
}

#if CLUSTER > 1
#define TOGETHER __cluster_dims__(CLUSTER, 1, 1)
#else
#define TOGETHER
#endif

// bias: 16-bit elements, or null; unit: the weight's.
extern "C" __global__ void TOGETHER __launch_bounds__(all_threads, 1)
stream_integers(const u16* x, const __grid_constant__ TensorMap codes, const __grid_constant__ TensorMap factors,
                const u16* bias, int rows, int n, int k, float unit, Out* out) {
    release_dependents();
    extern __shared__ __align__(1024) u8 memory[];
    const Ring ring{shared_address(memory)};
    const Work work(n, k);
    const int spans = work.band_stages * stage_spans;
    const IntegerRows integers{ring.memory + rows_at, ring.memory + rows_at + spans * passes * operand_bytes};
    const int warp = __shfl_sync(every_lane, threadIdx.x / 32, 0);  // tells the compiler: the same for all lanes
    if constexpr (cluster > 1) arrive_in_cluster();
    if (warp == consumer_warps) {
        Feed feed{ring, work, codes, factors};
        if (threadIdx.x == consumers) {
            ring.create();
#pragma unroll 1
            for (int i = 0; i < stages && !feed.done(); i++) feed.ask();
        }
        __syncwarp();
        if constexpr (cluster > 1) wait_for_cluster(), meet_cluster();
        else __syncthreads();
        if (threadIdx.x == consumers)
#pragma unroll 1
            while (!feed.done()) {
                wait_barrier(ring.empty(feed.turn), feed.turn.phase ^ 1);
                feed.ask();
            }
        return;
    }
    const int split = warp / tile_warps;
    const Lane lane(integers, warp % tile_warps * warp_tiles);
    float* totals = reinterpret_cast<float*>(memory + totals_at);
    if constexpr (cluster > 1) wait_for_cluster();
    await_producers();
    integers.fill(x, rows, k, unit, spans, consumers);
    if constexpr (cluster > 1) meet_cluster();
    else __syncthreads();
    Turn<stages> turn;
    for (int band = blockIdx.x; band < work.bands; band += gridDim.x) {
        Sums sums[warp_tiles] = {};
        int left = split / stage_splits;  // stages to the next of this warp's
        for (int at = 0; at < spans; at += stage_spans, turn.next()) {
            if constexpr (stage_turns > 1) {
                if (left-- > 0) continue;
                left = stage_turns - 1;
            }
            wait_barrier(ring.full(turn), turn.phase);
            const u32 stage = ring.stage(turn);
#pragma unroll 1
            for (int i = split % stage_splits; i < stage_spans; i += stage_splits)
                add_span(sums, lane, stage + lane.codes + i * span_units * next_codes,
                         stage + lane.factors + i * span_units * next_factors, at + i);
            __syncwarp();
            if (lane.speaks) arrive_at(ring.empty(turn));
        }
        if (band >= gridDim.x) meet(1, consumers);  // all have read the totals of the band before
#pragma unroll
        for (int i = 0; i < warp_tiles; i++) {
            const float low = add_steps(sums[i], 0), high = add_steps(sums[i], 1);
            if (threadIdx.x % at_once == 0) {
                const int row = threadIdx.x % 4 / at_once, g = threadIdx.x % 32 / 4;
                float* to = totals + ((warp * warp_tiles + i) * x_rows + row) * tile_rows + g;
                to[0] = low, to[8] = high;
            }
        }
        meet(1, consumers);
        for (int i = threadIdx.x; i < tiles * x_rows * 8; i += consumers) {
            const int row = i / 8 % x_rows, g = i % 8;
            float both[2] = {};
#pragma unroll
            for (int s = 0; s < splits; s++) {
                const float* from = totals + s * (tiles * x_rows * tile_rows) + i / 8 * tile_rows + g;
                both[0] += from[0], both[1] += from[8];
            }
            if (row < rows) write_two(both[0], both[1], bias, out, n, (band * tiles + i / 8 / x_rows) * tile_rows, n, g, row);
        }
    }
}
