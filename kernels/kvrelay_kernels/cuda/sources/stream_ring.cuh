// A ring of stages in shared memory: a few units of codes of a band of weight rows, their factors, and the columns of x
// that they are multiplied with. One thread asks the copy engine for the weight, as far ahead as the ring goes; others
// bring x.
//
// x is brought as halves, in the order of columns in which lanes have codes. A bfloat16 is a half with more exponent and
// less fraction: where all of a row's 64 columns lie in a half's range they are taken as they are, otherwise times a
// power of two, which the sums are told. What is 2^-17 of the largest of them or more keeps all its bits.
#pragma once
#include "elements.cuh"
#include "half_codes.cuh"
#include "turn.cuh"
#include "warpgroup.cuh"

constexpr int columns = COLUMNS;  // rows of x, padded: 8, 16, 32 or 64
constexpr int tiles = TILES;      // of 16 weight rows in a band, an even number
constexpr int cluster = CLUSTER;  // thread blocks that share a band's columns
constexpr int stage_units = STAGE_UNITS, stages = STAGES;
constexpr int tile_warps = (tiles + 3) / 4 * 4;                // a warp a tile, in whole warpgroups
constexpr int groups = tile_warps < 16 ? 16 / tile_warps : 1;  // of such warps, which take turns at a stage's units
static_assert(stage_units % groups == 0, "a group without units");
constexpr int consumer_warps = groups * tile_warps, consumers = 32 * consumer_warps;
constexpr int row_warps = ROW_WARPS;  // that bring x
constexpr int all_threads = consumers + 32 * (1 + row_warps);

constexpr int x_unit_bytes = columns * 128, x_bytes = stage_units * x_unit_bytes;
constexpr int pairs = tiles / pair_tiles;
constexpr int pair_code_bytes = pair_tiles * unit_code_bytes, pair_factor_bytes = pair_tiles * unit_factor_bytes;
constexpr int codes_at = x_bytes, factors_at = codes_at + pairs * stage_units * pair_code_bytes;
constexpr int stage_bytes = (factors_at + pairs * stage_units * pair_factor_bytes + 1023) / 1024 * 1024;
// Powers of two, a unit and row, behind a word of each warp that brings x: has it any but 1.
constexpr int flag_bytes = (row_warps + 3) / 4 * 16, powers_bytes = stage_units * columns * 4 + flag_bytes;
constexpr int powers_at = stages * stage_bytes, barriers_at = powers_at + stages * powers_bytes;
constexpr int row_depth = ROW_DEPTH, arriving_at = barriers_at + 16 * stages;  // passes of x on their way, by warp
constexpr int pass_rows = columns < 16 ? columns : 16, passes = columns / pass_rows;  // of a unit
constexpr int quads = pass_rows / 4;                                                   // of rows: 16 bytes of each lane
constexpr int shared_bytes_used = arriving_at + row_warps * row_depth * quads * 512;
static_assert(shared_bytes_used <= SHARED_BYTES, "what the launcher asks for");

using Place = Turn<stages>;

struct Ring {
    u32 memory;

    DEVICE u32 stage(const Place& turn) const { return memory + turn.at * stage_bytes; }
    DEVICE u32 powers(const Place& turn) const { return memory + powers_at + turn.at * powers_bytes; }
    DEVICE u32 power(const Place& turn, int unit, int row) const {
        return powers(turn) + flag_bytes + (unit * columns + row) * 4;
    }
    DEVICE bool any_power(const Place& turn) const {
        return __any_sync(every_lane, load_shared(powers(turn) + 4 * (threadIdx.x % 32 % row_warps)));
    }
    DEVICE u32 full(const Place& turn) const { return memory + barriers_at + turn.at * 16; }
    DEVICE u32 empty(const Place& turn) const { return full(turn) + 8; }

    DEVICE void create() const {
        for (Place turn; turn.phase == 0; turn.next()) {
            create_barrier(full(turn), 1 + row_warps);
            create_barrier(empty(turn), consumer_warps);
        }
        publish_barriers();
    }
};

// A thread block's share: every so many bands, of each the same units.
struct Share {
    int units;         // of a band
    int begin, end;    // this block's
    int bands, step;

    DEVICE Share(int n, int k) : units((k + unit_columns - 1) / unit_columns), step(gridDim.x / cluster) {
        const int rank = blockIdx.x % cluster;
        begin = rank * units / cluster, end = (rank + 1) * units / cluster;
        bands = (n + tiles * tile_rows - 1) / (tiles * tile_rows);
    }
};
// The units that fill one stage.
struct Stage {
    int band, unit;
    DEVICE explicit Stage(const Share& share) : band(blockIdx.x / cluster), unit(share.begin) {}
    DEVICE bool none(const Share& share) const { return band >= share.bands; }
    DEVICE void advance(const Share& share) {
        unit += stage_units;
        if (unit >= share.end) unit = share.begin, band += share.step;
    }
};

// One thread: whole stages, be they full or not. codes and factors: the weight's, in planes of a pair of tiles and rows of
// a unit.
DEVICE void bring_weight(const Ring& ring, const Share& share, const TensorMap& codes, const TensorMap& factors) {
    Place turn;
    bool first = true;
    for (Stage stage(share); !stage.none(share); stage.advance(share)) {
        if (!first) wait_barrier(ring.empty(turn), turn.phase ^ 1);
        const u32 full = ring.full(turn), to = ring.stage(turn);
        expect_bytes(full, pairs * stage_units * (pair_code_bytes + pair_factor_bytes));
        copy_planes_once(to + codes_at, &codes, stage.unit, stage.band * pairs, full);
        copy_planes_once(to + factors_at, &factors, stage.unit, stage.band * pairs, full);
        turn.next();
        if (turn.at == 0) first = false;
    }
}

// The power of two, 2^(-23 c), that takes bfloat16 with this exponent of the largest size to where halves are exact.
DEVICE float power_for(int exponent) {
    const int c = exponent == 0 ? 0 : max(exponent - 73, 0) / 23 - 2;
    return __uint_as_float(u32(127 - 23 * c) << 23);
}
DEVICE bool needs_power(int exponent) { return exponent != 0 && u32(exponent - 119) > 22; }
DEVICE float inverse_power(float power) { return __uint_as_float((254u << 23) - __float_as_uint(power)); }

// The exponent of the largest of eight bfloat16.
DEVICE int largest_exponent(const u32 (&v)[4]) {
    u32 size = 0;
#pragma unroll
    for (int q = 0; q < 4; q++) size = max(size, max(v[q] << 1, v[q] << 17));  // without the sign
    return size >> 24;
}

// Where a warp is in x: it takes every `row_warps`-th of a stage's passes.
struct RowPlace {
    Stage stage;
    int done, warp;

    DEVICE RowPlace(const Share& share, int warp) : stage(share), done(warp), warp(warp) { settle(share); }
    DEVICE bool none(const Share& share) const { return stage.none(share); }
    DEVICE void settle(const Share& share) {
        if (done >= stage_units * passes) stage.advance(share), done = warp;
    }
};

// A warp that brings x, through a little ring of its own: each lane takes back what it asked for itself. Of four rows at
// once a lane has the 16 bytes `piece` of row `row`.
struct RowFeed {
    const Ring& ring;
    const Share& share;
    const u16* from;
    int rows, k, column;
    u32 arriving;
    u32 places[2][4];  // of its four pairs of columns in an even four rows, and in an odd

    DEVICE RowFeed(const Ring& ring, const Share& share, const u16* x, int rows, int k, int warp)
        : ring(ring), share(share), rows(rows), k(k) {
        const int lane = threadIdx.x & 31, row = lane / 8, piece = lane % 8;
        column = piece * 8;
        from = x + u64(row) * k + column;
        arriving = ring.memory + arriving_at + warp * (row_depth * quads * 512) + lane * 16;
#pragma unroll
        for (int q = 0; q < 4; q++) {
            const int step = run == 8 ? piece / 4 * 2 + q / 2 : piece / 2;
            const int t = run == 8 ? piece % 4 : piece % 2 * 2 + q / 2;
#pragma unroll
            for (int odd = 0; odd < 2; odd++)
                places[odd][q] = swizzled((4 * odd + row) * 128 + step * 32 + q % 2 * 16 + t * 4);
        }
    }

    DEVICE void fetch(RowPlace& at, int slot) const {
        if (!at.none(share)) {
            const int unit = at.stage.unit + at.done / passes, first = at.done % passes * pass_rows, row = threadIdx.x % 32 / 8;
            const bool there = unit < share.end && unit * unit_columns + column < k;
            const u16* place = from + u64(first) * k + unit * unit_columns;
#pragma unroll
            for (int i = 0; i < quads; i++) {
                const bool valid = there && first + 4 * i + row < rows;
                copy16(arriving + (slot * quads + i) * 512, reinterpret_cast<const u8*>(valid ? place + 4 * i * k : from), valid ? 16 : 0);
            }
            at.done += row_warps, at.settle(share);
        }
        close_copies();
    }

    // What has arrived becomes rows of the other operand; whether powers of two were needed.
    DEVICE bool convert(const Place& turn, int pass, int slot) const {
        u32 v[quads][4];
        const int unit = pass / passes, first = pass % passes * pass_rows;
        bool scaled = false;
#pragma unroll
        for (int i = 0; i < quads; i++) load_shared4(v[i][0], v[i][1], v[i][2], v[i][3], arriving + (slot * quads + i) * 512);
        if constexpr (bfloat) {
            int exponents[quads];
#pragma unroll
            for (int i = 0; i < quads; i++) {
                exponents[i] = largest_exponent(v[i]);
#pragma unroll
                for (int mask = 1; mask < 8; mask *= 2)
                    exponents[i] = max(exponents[i], __shfl_xor_sync(every_lane, exponents[i], mask));
                scaled |= needs_power(exponents[i]);
            }
            scaled = __any_sync(every_lane, scaled);
            const int row = threadIdx.x % 32 / 8;
#pragma unroll
            for (int i = 0; i < quads; i++) {
                const float power = scaled ? power_for(exponents[i]) : 1;
                if (column == 0) store_shared(ring.power(turn, unit, first + 4 * i + row), __float_as_uint(power));
#pragma unroll
                for (int q = 0; q < 4; q++) {
                    float low = low_bfloat(v[i][q]), high = high_bfloat(v[i][q]);
                    if (scaled) low *= power, high *= power;
                    v[i][q] = pack<false>(low, high);
                }
            }
        }
        const u32 to = ring.stage(turn) + unit * x_unit_bytes + first * 128;
#pragma unroll
        for (int i = 0; i < quads; i++)
#pragma unroll
            for (int q = 0; q < 4; q++) store_shared(to + places[i % 2][q] + i / 2 * 1024, v[i][q]);
        return scaled;
    }

    DEVICE void run_all(int warp) const {
        RowPlace ahead(share, warp);
        for (int slot = 0; slot < row_depth; slot++) fetch(ahead, slot);
        Place turn;
        bool first_turn = true;
        int slot = 0;
        for (Stage stage(share); !stage.none(share); stage.advance(share)) {
            if (!first_turn) wait_barrier(ring.empty(turn), turn.phase ^ 1);
            bool scaled = false;
            for (int pass = warp; pass < stage_units * passes; pass += row_warps) {
                wait_copies<row_depth - 1>();
                scaled |= convert(turn, pass, slot);
                fetch(ahead, slot);
                slot = slot + 1 == row_depth ? 0 : slot + 1;
            }
            const bool speaks = threadIdx.x % 32 == 0;
            if (bfloat && speaks) store_shared(ring.powers(turn) + 4 * warp, scaled);
            order_before_bulk();
            __syncwarp();
            if (speaks) arrive_at(ring.full(turn));
            turn.next();
            if (turn.at == 0) first_turn = false;
        }
    }
};
