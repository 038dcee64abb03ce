// x @ weight.T for a few rows of x on Hopper, 16-bit elements, at the speed of reading the weight.
//
// A thread block has whole rows of the weight, a tile of them at a time. One thread keeps a ring of shared memory full,
// with panels of the tile and those of x that meet them; warpgroups multiply, 64 weight rows each by all rows of x.
// The ring fills with weights while the kernels ahead still run; only x waits for them.
// A sum runs over all columns in order, 16 at a time: its bits depend on nothing else.
#include "stream_write.cuh"
#include "turn.cuh"
#include "warpgroup.cuh"

constexpr int columns = COLUMNS;      // rows of x, filled up with zeros
constexpr int tile_rows = TILE_ROWS;  // of the weight, a multiple of 8
constexpr int panels = PANELS;        // of 64 columns, that a place in the ring has
constexpr int stages = STAGES;        // places
constexpr int groups = (tile_rows + 63) / 64;  // warpgroups that multiply; rows behind the tile's are whatever lies there
constexpr int threads = 128 * groups;          // of theirs
constexpr int panel_columns = 64, unit_columns = panels * panel_columns;
constexpr int weight_panel = tile_rows * 128, x_panel = columns * 128;
constexpr int x_at = panels * weight_panel, stage_bytes = x_at + panels * x_panel;
constexpr int eight_rows = 8 * 128;
static_assert(stages > 1, "one place is read while another one is released");

extern __shared__ __align__(1024) u8 memory[];

// Behind the ring.
struct Control {
    u64 full[stages], empty[stages];
};
static_assert(sizeof(Control) <= CONTROL_BYTES, "the launcher asks for less shared memory than that");

#if HAS_WARPGROUPS
// The tiles of this block; the columns of each are `units` units.
struct Work {
    int first, end, units;

    DEVICE Work(int n, int k) : units((k + unit_columns - 1) / unit_columns) {
        const int tiles = (n + tile_rows - 1) / tile_rows;
        first = blockIdx.x * tiles / gridDim.x, end = (blockIdx.x + 1) * tiles / gridDim.x;
    }
};

// A unit of them, and its place in the ring.
struct Stage {
    int tile, unit;
    Turn<stages> turn;

    DEVICE explicit Stage(const Work& work) : tile(work.first), unit(0) {}
    DEVICE void next(const Work& work) {
        if (++unit == work.units) unit = 0, tile++;
        turn.next();
    }
};

// What one thread asks for: a unit's part of the weight, and that of x.
struct Feed {
    const TensorMap &x, &weight;
    u32 ring, full, empty;

    DEVICE void ask_weight(const Stage& to) const {
        const u32 place = ring + to.turn.at * stage_bytes, barrier = full + 8 * to.turn.at;
        expect_bytes(barrier, stage_bytes);
#pragma unroll
        for (int p = 0; p < panels; p++)
            copy_box_once(place + p * weight_panel, &weight, to.unit * unit_columns + p * panel_columns, to.tile * tile_rows, barrier);
    }
    DEVICE void ask_x(const Stage& to) const {
        const u32 place = ring + to.turn.at * stage_bytes + x_at, barrier = full + 8 * to.turn.at;
#pragma unroll
        for (int p = 0; p < panels; p++)
            copy_box(place + p * x_panel, &x, to.unit * unit_columns + p * panel_columns, 0, barrier);
    }
    DEVICE void run(const Work& work) const {
        Stage stage(work), late(work);
        const int ahead = min(stages, (work.end - work.first) * work.units);
        for (int i = 0; i < ahead; i++, stage.next(work)) ask_weight(stage);
        await_producers();
        for (int i = 0; i < ahead; i++, late.next(work)) ask_x(late);
        for (; stage.tile < work.end; stage.next(work)) {
            wait_barrier(empty + 8 * stage.turn.at, stage.turn.phase ^ 1);
            ask_weight(stage);
            ask_x(stage);
        }
    }
};

// One unit: 64 weight rows of each warpgroup by all rows of x. Ends when the unit before is done.
DEVICE void multiply_unit(float (&sums)[columns / 2], u64 weight, u64 x) {
    hold(sums);
    open_products();
#pragma unroll
    for (int p = 0; p < panels; p++)
#pragma unroll
        for (int k = 0; k < 128; k += 32) multiply_shared<true>(sums, weight + moved(p * weight_panel + k), x + moved(p * x_panel + k));
    close_products();
    wait_products<1>();
}

// Warps have 16 rows of a tile each.
DEVICE void write_tile(const float (&sums)[columns / 2], const u16* bias, Out* out, int rows, int n, int tile) {
    const int band = tile * tile_rows + threadIdx.x / 32 * 16, end = min(n, (tile + 1) * tile_rows);
#pragma unroll
    for (int j = 0; j < columns / 8; j++) {
        if (8 * j >= rows || band >= end) return;
        write_eight(reinterpret_cast<const float(&)[4]>(sums[4 * j]), bias, out, rows, n, band, end, j);
    }
}
#endif

// x: [rows, k], rows up to `columns`; weight: [n, k]; bias: [n] or null; out: [rows, n].
extern "C" __global__ void __launch_bounds__(threads + 32, 1)
stream_rows(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const u16* bias, Out* out, int rows,
            int n, int k) {
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
    const Work work(n, k);
    if (threadIdx.x >= threads) {
        if (threadIdx.x == threads) Feed{x, weight, ring, full, empty}.run(work);
        return;
    }
    await_producers();
    const int group = __shfl_sync(every_lane, threadIdx.x / 128, 0);  // tells the compiler: the same for all
    const u64 weights = describe(ring + group * 64 * 128, 16, eight_rows), others = describe(ring + x_at, 16, eight_rows);
    Turn<stages> turn, done;
    const auto release = [&] {
        if (threadIdx.x % 32 == 0) arrive_at(empty + 8 * done.at);
        done.next();
    };
    for (int tile = work.first; tile < work.end; tile++) {
        float sums[columns / 2] = {};
        for (int unit = 0; unit < work.units; unit++, turn.next()) {
            wait_barrier(full + 8 * turn.at, turn.phase);
            multiply_unit(sums, weights + moved(turn.at * stage_bytes), others + moved(turn.at * stage_bytes));
            if (unit > 0) release();
        }
        wait_products<0>();
        hold(sums);
        release();
        write_tile(sums, bias, out, rows, n, tile);
    }
#endif
}
