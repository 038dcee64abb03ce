// x @ weight.T for a few rows of x on Hopper, 16-bit elements, at the speed of reading the weight.
//
// One warp keeps a ring of shared memory full, with tiles of the weight and the columns of x that meet them; warpgroups
// multiply, 64 weight rows each by all rows of x. What a block multiplies is an even part of the weight (stream_split.cuh).
// The ring fills with weights while the kernels ahead still run; only x waits for them.
// Sums run over 16 columns at a time, in order, whatever the number of rows: so a row's bits do not depend on it.
#include "elements.cuh"
#include "stream_split.cuh"
#include "turn.cuh"

constexpr int groups = GROUPS;    // warpgroups that multiply
constexpr int columns = COLUMNS;  // rows of x, filled up with zeros
constexpr int stages = STAGES;
constexpr int panel_columns = 64;           // 128 bytes of a row
constexpr int tile_rows = 64 * groups;
constexpr int threads = 128 * groups;       // that multiply
constexpr int weight_bytes = tile_rows * 128;
constexpr int stage_bytes = weight_bytes + columns * 128;
constexpr int eight_rows = 8 * 128;
constexpr int meeting_barrier = 1;          // a named one

#if FLOAT_OUT
using Out = float;
#else
using Out = u16;
#endif

extern __shared__ __align__(1024) u8 memory[];

// Behind the ring.
struct Control {
    u64 full[stages], empty[stages];
    u32 verdict;
};
static_assert(sizeof(Control) <= CONTROL_BYTES, "the launcher asks for less shared memory than that");

#if HAS_WARPGROUPS
// A place in the ring, and the unit that goes there.
struct Stage {
    const Split& split;
    Piece piece;  // from this unit on
    Turn<stages> turn;

    DEVICE explicit Stage(const Split& split) : split(split), piece(split.first()) {}
    DEVICE void next() {
        if (++piece.begin == piece.end) piece = split.next(piece);
        turn.next();
    }
};

// What one thread asks for: a unit's part of the weight, and that of x.
struct Feed {
    const TensorMap &x, &weight;
    u32 ring, full, empty;

    DEVICE void ask_weight(const Stage& to) const {
        const u32 barrier = full + 8 * to.turn.at;
        expect_bytes(barrier, stage_bytes);
        copy_box(ring + to.turn.at * stage_bytes, &weight, to.piece.begin * panel_columns, to.piece.tile * tile_rows, barrier);
    }
    DEVICE void ask_x(const Stage& to) const {
        const u32 place = ring + to.turn.at * stage_bytes + weight_bytes;
        copy_box(place, &x, to.piece.begin * panel_columns, 0, full + 8 * to.turn.at);
    }
    DEVICE void run(const Split& split) const {
        Stage stage(split), late(split);
        const int ahead = min(stages, split.stop - split.start);
        for (int i = 0; i < ahead; i++, stage.next()) ask_weight(stage);
        await_producers();
        for (int i = 0; i < ahead; i++, late.next()) ask_x(late);
        for (; !stage.piece.none(); stage.next()) {
            wait_barrier(empty + 8 * stage.turn.at, stage.turn.phase ^ 1);
            ask_weight(stage);
            ask_x(stage);
        }
    }
};

// A tile's sums: lane (g, t) of a warp has rows g and g + 8 of its 16, and of each eight rows of x 2t and 2t + 1.
DEVICE void write_tile(const float (&sums)[columns / 2], const u16* bias, Out* out, int rows, int n, int tile) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int band = tile * tile_rows + threadIdx.x / 32 * 16;  // the warp's first weight row
    float added[2] = {0, 0}, ignored;
#pragma unroll
    for (int half = 0; half < 2; half++)
        if (const int at = band + g + 8 * half; bias && at < n) widen(added[half], ignored, __ldg(bias + at));
#pragma unroll
    for (int j = 0; j < columns / 8; j++) {
        if (8 * j >= rows) return;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float x = sums[4 * j + 2 * half] + added[half], y = sums[4 * j + 2 * half + 1] + added[half];
#if FLOAT_OUT
            const int row = 8 * j + 2 * t, at = band + g + 8 * half;
            if (at < n && row < rows) out[u64(row) * n + at] = x;
            if (at < n && row + 1 < rows) out[u64(row + 1) * n + at] = y;
#else
            const u32 pair = transpose_halves(pack<bfloat>(x, y));  // neighbours in the weight's rows
            const int row = 8 * j + g, at = band + 2 * t + 8 * half;
            u16* to = out + u64(row) * n + at;
            if (row >= rows) continue;
            if (n % 2 == 0 && at < n) {
                *reinterpret_cast<u32*>(to) = pair;
            } else {
                if (at < n) to[0] = u16(pair);
                if (at + 1 < n) to[1] = u16(pair >> 16);
            }
#endif
        }
    }
}

// One unit: 64 weight rows of each warpgroup by all rows of x.
DEVICE void multiply_unit(float (&sums)[columns / 2], u64 weight, u64 x) {
    open_products();
#pragma unroll
    for (int k = 0; k < panel_columns; k += 16) multiply_shared<true>(sums, weight + moved(2 * k), x + moved(2 * k));
    close_products();
    wait_products<0>();
    hold(sums);
}
#endif

// x: [rows, k], rows up to `columns`; weight: [n, k]; bias: [n] or null; out: [rows, n]; pieces, arrivals: as Meeting's.
extern "C" __global__ void __launch_bounds__(128 * GROUPS + 32, 1)
stream_rows(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const u16* bias, Out* out,
            float4* pieces, u32* arrivals, int rows, int n, int k) {
#if HAS_WARPGROUPS
    release_dependents();
    Control& control = *reinterpret_cast<Control*>(memory + stages * stage_bytes);
    const u32 ring = shared_address(memory), full = shared_address(control.full), empty = shared_address(control.empty);
    if (threadIdx.x == 0) {
        prefetch_map(&x);
        prefetch_map(&weight);
        for (int i = 0; i < stages; i++) {
            create_barrier(full + 8 * i, 1);
            create_barrier(empty + 8 * i, threads / 32);
        }
        publish_barriers();
    }
    __syncthreads();
    const Split split((n + tile_rows - 1) / tile_rows, (k + panel_columns - 1) / panel_columns);
    if (threadIdx.x >= threads) {
        if (threadIdx.x == threads) Feed{x, weight, ring, full, empty}.run(split);
        return;
    }
    await_producers();
    const Meeting meeting{pieces, arrivals, shared_address(&control.verdict), int(threadIdx.x), meeting_barrier};
    const int group = __shfl_sync(every_lane, threadIdx.x / 128, 0);  // tells the compiler: the same for all
    const u64 weights = describe(ring + group * 64 * 128, 16, eight_rows), others = describe(ring + weight_bytes, 16, eight_rows);
    Turn<stages> turn;
    for (Piece piece = split.first(); !piece.none(); piece = split.next(piece)) {
        float sums[columns / 2] = {};
        for (int unit = piece.begin; unit < piece.end; unit++) {
            wait_barrier(full + 8 * turn.at, turn.phase);
            hold(sums);
            multiply_unit(sums, weights + moved(turn.at * stage_bytes), others + moved(turn.at * stage_bytes));
            if (threadIdx.x % 32 == 0) arrive_at(empty + 8 * turn.at);
            turn.next();
        }
        if (add_up<threads>(sums, split, piece, meeting)) write_tile(sums, bias, out, rows, n, piece.tile);
    }
#endif
}
