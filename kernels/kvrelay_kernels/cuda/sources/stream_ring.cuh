// A ring of stages in shared memory: a few units of codes of 256 weight rows, their factors, and the columns of x that
// they are multiplied with. One warp asks the copy engine for the weight, as far ahead as the ring goes; others bring x.
//
// x is brought as halves, in the order of columns in which lanes have codes. A bfloat16 is a half with more exponent and
// less fraction: where all of a row's 64 columns lie in a half's range they are taken as they are, otherwise times a
// power of two, which the sums are told. What is 2^-17 of the largest of them or more keeps all its bits.
#pragma once
#include "elements.cuh"
#include "half_codes.cuh"
#include "stream_split.cuh"

constexpr int columns = COLUMNS;           // rows of x, padded: 8, 16, 32 or 64
constexpr int stage_units = STAGE_UNITS, stages = STAGES;
constexpr int warpgroups = 4, consumer_warps = 4 * warpgroups, consumers = 32 * consumer_warps;
constexpr int row_warps = THREADS / 32 - consumer_warps - 1;  // that bring x
static_assert(stages >= row_warps, "a warp could take a barrier's phase for the one before the last");
constexpr int band_rows = 16 * consumer_warps, band_tiles = consumer_warps;

constexpr int x_unit_bytes = columns * 128, x_bytes = stage_units * x_unit_bytes;
constexpr int codes_at = x_bytes, factors_at = codes_at + band_tiles * stage_units * unit_code_bytes;
constexpr int stage_bytes = factors_at + band_tiles * stage_units * unit_factor_bytes;
static_assert(stage_bytes % 1024 == 0, "a swizzled matrix begins at a multiple of 1024");
constexpr int powers_bytes = stage_units * columns * 4 + 16;  // of two, a unit and row, behind a word: are there any
constexpr int powers_at = stages * stage_bytes, barriers_at = powers_at + stages * powers_bytes;
constexpr int verdict_at = barriers_at + 16 * stages;
constexpr int row_depth = ROW_DEPTH, arriving_at = verdict_at + 16;  // passes of x on their way, for each warp that brings it
constexpr int shared_bytes_used = arriving_at + row_warps * row_depth * (columns < 16 ? columns : 16) * 128;
static_assert(shared_bytes_used <= SHARED_BYTES, "what the launcher asks for");

// A place in the ring, and which turn of it this is.
struct Turn {
    int stage = 0;
    u32 phase = 0;
    DEVICE void advance(int by = 1) {
        stage += by;
        if (stage >= stages) stage -= stages, phase ^= 1;
    }
};

struct Ring {
    u32 memory;

    DEVICE u32 stage(const Turn& turn) const { return memory + turn.stage * stage_bytes; }
    DEVICE u32 powers(const Turn& turn) const { return memory + powers_at + turn.stage * powers_bytes; }
    DEVICE u32 full(const Turn& turn) const { return memory + barriers_at + turn.stage * 16; }
    DEVICE u32 empty(const Turn& turn) const { return full(turn) + 8; }
    DEVICE u32 verdict() const { return memory + verdict_at; }

    DEVICE void create() const {
        for (Turn turn; turn.phase == 0; turn.advance()) {
            create_barrier(full(turn), 2);
            create_barrier(empty(turn), consumer_warps);
        }
        publish_barriers();
    }
};

// The stages of a thread block, one behind the other: none goes on into the next tile.
struct Stage {
    int tile, unit, count;
};
template <class Visit>
DEVICE void each_stage(const Split& split, Visit visit) {
    for (Piece piece = split.first(); !piece.none(); piece = split.next(piece))
        for (int unit = piece.begin; unit < piece.end; unit += stage_units)
            visit(Stage{piece.tile, unit, min(stage_units, piece.end - unit)});
}

// One warp: a lane copies the codes of one of 16 tiles, or the factors.
DEVICE void bring_weight(const Ring& ring, const Split& split, const u8* codes, const u8* factors, int last_tile) {
    const int lane = threadIdx.x & 31;
    const bool upper = lane >= band_tiles;
    const int tile = lane % band_tiles, bytes = upper ? unit_factor_bytes : unit_code_bytes;
    const u32 place = upper ? factors_at + tile * stage_units * unit_factor_bytes : codes_at + tile * stage_units * unit_code_bytes;
    const u8* from = upper ? factors : codes;
    Turn turn;
    bool first = true;
    each_stage(split, [&](const Stage& s) {
        if (!first) wait_barrier(ring.empty(turn), turn.phase ^ 1);
        if (lane == 0)
            expect_bytes(ring.full(turn), band_tiles * s.count * (unit_code_bytes + unit_factor_bytes));
        __syncwarp();
        const u64 at = u64(min(s.tile * band_tiles + tile, last_tile)) * split.units + s.unit;
        copy_bytes(ring.stage(turn) + place, from + at * bytes, s.count * bytes, ring.full(turn));
        turn.advance();
        if (turn.stage == 0) first = false;
    });
}

// The power of two, 2^(-23 c), that takes bfloat16 with these bits of the largest size to where halves are exact.
DEVICE float power_for(u32 largest) {
    const int exponent = largest >> 23;
    const int c = exponent == 0 ? 0 : max(exponent - 73, 0) / 23 - 2;
    return __uint_as_float(u32(127 - 23 * c) << 23);
}
DEVICE float inverse_power(float power) { return __uint_as_float((254u << 23) - __float_as_uint(power)); }

DEVICE u32 largest_size(uint4 v) {
    const u32 high = max(max(v.x & 0x7fff0000u, v.y & 0x7fff0000u), max(v.z & 0x7fff0000u, v.w & 0x7fff0000u));
    const u32 low = max(max(v.x << 16 & 0x7fff0000u, v.y << 16 & 0x7fff0000u), max(v.z << 16 & 0x7fff0000u, v.w << 16 & 0x7fff0000u));
    return max(high, low);
}

// One warp takes 16 rows of 64 columns at once, or all 8, on their way through a little ring of its own.
constexpr int pass_rows = columns < 16 ? columns : 16, passes = columns / pass_rows;  // of a unit
constexpr int quads = pass_rows / 4;                                                   // of rows: 16 bytes of each lane

// Where a warp is in x: it takes every `row_warps`-th stage.
struct RowPlace {
    Piece piece;
    int unit, count;  // the stage's
    int done;         // passes of the stage
    Turn turn;
    int turns = 0;    // stages ahead of this one

    DEVICE RowPlace(const Split& split, int warp) : piece(split.first()), unit(piece.begin), done(0) {
        settle();
        skip(split, warp);
    }
    DEVICE bool none() const { return piece.none(); }
    DEVICE void settle() { count = min(stage_units, piece.end - unit); }
    DEVICE void skip(const Split& split, int by) {
        for (; by > 0 && !none(); by--) {
            unit += count, turns++;
            turn.advance();
            if (unit == piece.end) piece = split.next(piece), unit = piece.begin;
            settle();
        }
    }
    DEVICE void advance(const Split& split) {
        if (++done == count * passes) done = 0, skip(split, row_warps);
    }
};

struct RowFeed {
    const Ring& ring;
    const Split& split;
    const u16* x;
    int rows, k;
    u32 arriving;  // this lane's place in the little ring
    int lane, row, piece;

    DEVICE RowFeed(const Ring& ring, const Split& split, const u16* x, int rows, int k, int warp)
        : ring(ring), split(split), x(x), rows(rows), k(k), lane(threadIdx.x & 31), row(lane / 8), piece(lane % 8) {
        arriving = ring.memory + arriving_at + warp * (row_depth * quads * 512) + lane * 16;
    }

    DEVICE void fetch(const RowPlace& at, int slot) const {
        if (!at.none()) {
            const int column = (at.unit + at.done / passes) * unit_columns + piece * 8;
#pragma unroll
            for (int i = 0; i < quads; i++) {
                const int r = at.done % passes * pass_rows + 4 * i + row;
                const bool there = r < rows && column < k;
                copy16(arriving + (slot * quads + i) * 512, reinterpret_cast<const u8*>(there ? x + u64(r) * k + column : x), there ? 16 : 0);
            }
        }
        close_copies();
    }

    // What has arrived becomes rows of the other operand; whether powers of two were needed.
    DEVICE bool convert(const RowPlace& at, int slot) const {
        uint4 v[quads];
        float power[quads];
        bool scaled = false;
        const int unit = at.done / passes, first = at.done % passes * pass_rows + row;
#pragma unroll
        for (int i = 0; i < quads; i++) load_shared4(v[i].x, v[i].y, v[i].z, v[i].w, arriving + (slot * quads + i) * 512);
        if constexpr (bfloat) {
#pragma unroll
            for (int i = 0; i < quads; i++) {
                u32 size = largest_size(v[i]);
#pragma unroll
                for (int mask = 1; mask < 8; mask *= 2) size = max(size, __shfl_xor_sync(every_lane, size, mask));
                power[i] = power_for(size);
                scaled |= power[i] != 1;
                if (piece == 0)
                    store_shared(ring.powers(at.turn) + 16 + (unit * columns + first + 4 * i) * 4, __float_as_uint(power[i]));
            }
        }
        const u32 to = ring.stage(at.turn) + unit * x_unit_bytes;
#pragma unroll
        for (int i = 0; i < quads; i++) {
            const u32 words[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
            for (int q = 0; q < 4; q++) {
                const int step = run == 8 ? piece / 4 * 2 + q / 2 : piece / 2;
                const int t = run == 8 ? piece % 4 : piece % 2 * 2 + q / 2;
                const u32 pair = bfloat ? pack<false>(low_bfloat(words[q]) * power[i], high_bfloat(words[q]) * power[i]) : words[q];
                store_shared(to + swizzled((first + 4 * i) * 128 + step * 32 + q % 2 * 16 + t * 4), pair);
            }
        }
        return scaled;
    }

    DEVICE void run_all(int warp) const {
        RowPlace ahead(split, warp), now = ahead;
        for (int slot = 0; slot < row_depth; slot++) {
            fetch(ahead, slot);
            if (!ahead.none()) ahead.advance(split);
        }
        bool scaled = false;
        for (int slot = 0; !now.none(); slot = slot + 1 == row_depth ? 0 : slot + 1) {
            wait_copies<row_depth - 1>();
            if (now.done == 0 && now.turns >= stages) wait_barrier(ring.empty(now.turn), now.turn.phase ^ 1);
            scaled |= convert(now, slot);
            fetch(ahead, slot);
            if (!ahead.none()) ahead.advance(split);
            if (now.done + 1 == now.count * passes) {
                scaled = __any_sync(every_lane, scaled);
                if (bfloat && lane == 0) store_shared(ring.powers(now.turn), scaled);
                scaled = false;
                order_before_bulk();
                __syncwarp();
                if (lane == 0) arrive_at(ring.full(now.turn));
            }
            now.advance(split);
        }
    }
};
