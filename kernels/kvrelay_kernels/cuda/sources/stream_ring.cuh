// A ring of stages in shared memory: a few units of codes of a band of weight rows, their factors, and the columns of x
// that they are multiplied with, as halves. One thread asks the copy engine for the weight, as far ahead as the ring goes,
// and for x, where `halve_rows` has prepared it; otherwise warps bring x.
#pragma once
#include "elements.cuh"
#include "half_codes.cuh"
#include "row_halves.cuh"
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
constexpr bool prepared = row_warps == 0;
constexpr int all_threads = consumers + 32 * (1 + row_warps);

constexpr int x_unit_bytes = columns * 128, x_bytes = stage_units * x_unit_bytes;
constexpr int pairs = tiles / pair_tiles;
constexpr int pair_code_bytes = pair_tiles * unit_code_bytes, pair_factor_bytes = pair_tiles * unit_factor_bytes;
constexpr int codes_at = x_bytes, factors_at = codes_at + pairs * stage_units * pair_code_bytes;
constexpr int stage_bytes = (factors_at + pairs * stage_units * pair_factor_bytes + 1023) / 1024 * 1024;
constexpr int powers_bytes = stage_units * columns * 4;  // of two, a unit and row
constexpr int powers_at = stages * stage_bytes, barriers_at = powers_at + stages * powers_bytes;
constexpr int row_depth = ROW_DEPTH, arriving_at = barriers_at + 16 * stages;  // units of x on their way, by warp
constexpr int quads = 2;  // of rows, 16 bytes of each lane
static_assert(prepared || columns == 4 * quads, "rows that warps bring");
constexpr int shared_bytes_used = arriving_at + row_warps * row_depth * quads * 512;
static_assert(shared_bytes_used <= SHARED_BYTES, "what the launcher asks for");

using Place = Turn<stages>;

struct Ring {
    u32 memory;

    DEVICE u32 stage(const Place& turn) const { return memory + turn.at * stage_bytes; }
    DEVICE u32 powers(const Place& turn) const { return memory + powers_at + turn.at * powers_bytes; }
    DEVICE u32 power(const Place& turn, int unit, int row) const {
        return powers(turn) + (unit * columns + row) * 4;
    }
    // Has a stage any but 1.
    DEVICE bool any_power(const Place& turn) const {
        constexpr u32 one = 0x3f800000;
        u32 other = 0;
        for (int at = threadIdx.x % 32 * 16; at < powers_bytes; at += 512) {
            u32 a, b, c, d;
            load_shared4(a, b, c, d, powers(turn) + at);
            other |= (a ^ one) | (b ^ one) | (c ^ one) | (d ^ one);
        }
        return __any_sync(every_lane, other != 0);
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
    // Of any block of the cluster, at most.
    DEVICE int part_stages() const { return ((units + cluster - 1) / cluster + stage_units - 1) / stage_units; }
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

// One thread: brings whole stages, be they full or not. codes and factors: the weight's, in planes of a pair of tiles and
// rows of a unit; rows: what `halve_rows` wrote, if it did.
struct StageFeed {
    const Ring& ring;
    const Share& share;
    const TensorMap &codes, &factors;
    const void* rows;

    DEVICE void ask_weight(const Place& turn, const Stage& stage) const {
        const u32 full = ring.full(turn), to = ring.stage(turn);
        constexpr int of_rows = prepared ? x_bytes + (bfloat ? powers_bytes : 0) : 0;
        expect_bytes(full, pairs * stage_units * (pair_code_bytes + pair_factor_bytes) + of_rows);
        copy_planes_once(to + codes_at, &codes, stage.unit, stage.band * pairs, full);
        if constexpr (!row_scaled) copy_planes_once(to + factors_at, &factors, stage.unit, stage.band * pairs, full);
    }
    DEVICE void ask_rows(const Place& turn, const Stage& stage) const {
        const int part_units = share.part_stages() * stage_units;
        const int place = blockIdx.x % cluster * part_units + stage.unit - share.begin;
        const u8* halves = static_cast<const u8*>(rows);
        const u8* powers = halves + u64(cluster) * part_units * x_unit_bytes;
        copy_bytes(ring.stage(turn), halves + u64(place) * x_unit_bytes, x_bytes, ring.full(turn));
        if constexpr (bfloat) copy_bytes(ring.powers(turn), powers + place * columns * 4, powers_bytes, ring.full(turn));
    }

    DEVICE void run_all() const {
        Place turn;
        Stage stage(share);
        if constexpr (prepared) {  // as much of the weight as there is room for comes while x is prepared
            for (; turn.phase == 0 && !stage.none(share); stage.advance(share), turn.next()) ask_weight(turn, stage);
            const int asked = turn.phase ? stages : turn.at;
            await_producers();
            Place late;
            Stage first(share);
            for (int i = 0; i < asked; i++, first.advance(share), late.next()) ask_rows(late, first);
        }
        for (; !stage.none(share); stage.advance(share), turn.next()) {
            wait_barrier(ring.empty(turn), turn.phase ^ 1);
            ask_weight(turn, stage);
            if constexpr (prepared) ask_rows(turn, stage);
        }
    }
};

// Where a warp is in x: it takes every `row_warps`-th of a stage's units.
struct RowPlace {
    Stage stage;
    int done, warp;

    DEVICE RowPlace(const Share& share, int warp) : stage(share), done(warp), warp(warp) { settle(share); }
    DEVICE bool none(const Share& share) const { return stage.none(share); }
    DEVICE void settle(const Share& share) {
        if (done >= stage_units) stage.advance(share), done = warp;
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
    u32 places[quads][4];  // of its four pairs of columns

    DEVICE RowFeed(const Ring& ring, const Share& share, const u16* x, int rows, int k, int warp)
        : ring(ring), share(share), rows(rows), k(k) {
        const int lane = threadIdx.x & 31, row = lane / 8, piece = lane % 8;
        column = piece * 8;
        from = x + u64(row) * k + column;
        arriving = ring.memory + arriving_at + warp * (row_depth * quads * 512) + lane * 16;
#pragma unroll
        for (int i = 0; i < quads; i++)
#pragma unroll
            for (int q = 0; q < 4; q++) places[i][q] = pair_place(4 * i + row, piece, q);
    }

    DEVICE void fetch(RowPlace& at, int slot) const {
        if (!at.none(share)) {
            const int unit = at.stage.unit + at.done, row = threadIdx.x % 32 / 8;
            const bool there = unit < share.end && unit * unit_columns + column < k;
            const u16* place = from + unit * unit_columns;
#pragma unroll
            for (int i = 0; i < quads; i++) {
                const bool valid = there && 4 * i + row < rows;
                copy16(arriving + (slot * quads + i) * 512, reinterpret_cast<const u8*>(valid ? place + 4 * i * k : from), valid ? 16 : 0);
            }
            at.done += row_warps, at.settle(share);
        }
        close_copies();
    }

    // What has arrived becomes rows of the other operand.
    DEVICE void convert(const Place& turn, int unit, int slot) const {
        u32 v[quads][4];
#pragma unroll
        for (int i = 0; i < quads; i++) load_shared4(v[i][0], v[i][1], v[i][2], v[i][3], arriving + (slot * quads + i) * 512);
        if constexpr (bfloat) {
            int exponents[quads];
            bool scaled = false;
#pragma unroll
            for (int i = 0; i < quads; i++) exponents[i] = largest_exponent(v[i]), scaled |= needs_power(exponents[i]);
            scaled = __any_sync(every_lane, scaled);
            const int row = threadIdx.x % 32 / 8;
#pragma unroll
            for (int i = 0; i < quads; i++) {
                const float power = scaled ? power_for(exponents[i]) : 1;
                if (column == 0) store_shared(ring.power(turn, unit, 4 * i + row), __float_as_uint(power));
                round_to_halves(v[i], power);
            }
        }
        const u32 to = ring.stage(turn) + unit * x_unit_bytes;
#pragma unroll
        for (int i = 0; i < quads; i++)
#pragma unroll
            for (int q = 0; q < 4; q++) store_shared(to + places[i][q], v[i][q]);
    }

    DEVICE void run_all(int warp) const {
        RowPlace ahead(share, warp);
        for (int slot = 0; slot < row_depth; slot++) fetch(ahead, slot);
        Place turn;
        int slot = 0;
        for (Stage stage(share); !stage.none(share); stage.advance(share)) {
            wait_barrier(ring.empty(turn), turn.phase ^ 1);
            for (int unit = warp; unit < stage_units; unit += row_warps) {
                wait_copies<row_depth - 1>();
                convert(turn, unit, slot);
                fetch(ahead, slot);
                slot = slot + 1 == row_depth ? 0 : slot + 1;
            }
            order_before_bulk();
            __syncwarp();
            if (threadIdx.x % 32 == 0) arrive_at(ring.full(turn));
            turn.next();
        }
    }
};
