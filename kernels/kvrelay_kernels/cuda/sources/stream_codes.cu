// x @ weight.T for 1 to 64 rows of x and a weight of 4- or 8-bit codes, at the speed of reading the codes.
//
// Codes pass through a ring in shared memory into registers, become the matrix rounded to halves there, and are operand of
// Hopper's warpgroup instruction; x, in halves too, is the other one. So a weight costs the same few instructions whatever
// the number of rows. The order of sums depends on the weight's sizes and the number of multiprocessors alone: a row has
// the same bits in any company.
#include "stream_ring.cuh"
#include "stream_write.cuh"

constexpr int count = columns / 2;  // sums of a thread

// Sums times what x was multiplied with in this unit, or with its inverse.
DEVICE void scale_sums(float (&sums)[count], u32 powers, bool inverse) {
#pragma unroll
    for (int i = 0; i < count; i++) {
        const float power = __uint_as_float(load_shared(powers + (i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2) * 4));
        sums[i] *= inverse ? inverse_power(power) : power;
    }
}

// Adds the products of a stage.
DEVICE void add_stage(float (&sums)[count], const Ring& ring, const Turn& turn, int units, int warp, const CodeConstants& constants) {
    const u32 stage = ring.stage(turn), tile = warp * stage_units;
    const bool scaled = bfloat && load_shared(ring.powers(turn));  // x was multiplied with powers of two
    const u64 first = describe(stage, 0, 1024);
    u32 x = u32(first), powers = ring.powers(turn) + 16;
    u32 codes = stage + codes_at + tile * unit_code_bytes, factors = stage + factors_at + tile * unit_factor_bytes;
#pragma unroll 1
    for (int u = 0; u < units; u++) {
        HalfUnit unit;
        unit.load(codes, factors);
        wait_products<0>();
        hold(sums);
        u32 a[unit_steps][4];
#pragma unroll
        for (int s = 0; s < unit_steps; s++) unit.operand(a[s], s, constants);
        if (scaled) scale_sums(sums, powers, false);
        hold(sums);
        open_products();
#pragma unroll
        for (int s = 0; s < unit_steps; s++) multiply_halves(sums, a[s], first >> 32 << 32 | (x + u32(s * moved(32))));
        close_products();
        hold(sums);
        if (scaled) {
            wait_products<0>();
            hold(sums);
            scale_sums(sums, powers, true);
            powers += columns * 4;
        }
        x += moved(x_unit_bytes), codes += unit_code_bytes, factors += unit_factor_bytes;
    }
    wait_products<0>();
    hold(sums);
}

// bias: 16-bit elements, or null; nibbles: 0x000f000f.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
stream_codes(const u16* x, const u8* codes, const u8* factors, const u16* bias, int rows, int n, int k, float4* meeting,
             u32* arrivals, u32 nibbles, Out* out) {
    release_dependents();
    extern __shared__ __align__(1024) u8 memory[];
    const Ring ring{shared_address(memory)};
    if (threadIdx.x == 0) ring.create();
    __syncthreads();
    const Split split((n + band_rows - 1) / band_rows, (k + unit_columns - 1) / unit_columns);
    const int warp = __shfl_sync(every_lane, threadIdx.x / 32, 0);  // tells the compiler: the same for all lanes
    if (warp == consumer_warps) return bring_weight(ring, split, codes, factors, (n - 1) / tile_rows);
    if (warp > consumer_warps) {
        await_producers();
        const int taker = warp - consumer_warps - 1;
        return RowFeed(ring, split, x, rows, k, taker).run_all(taker);
    }
    await_producers();
    const CodeConstants constants(nibbles);
    Turn turn;
    for (Piece piece = split.first(); !piece.none(); piece = split.next(piece)) {
        float sums[count] = {};
        for (int unit = piece.begin; unit < piece.end; unit += stage_units) {
            wait_barrier(ring.full(turn), turn.phase);
            const int units = min(stage_units, piece.end - unit);
            add_stage(sums, ring, turn, units, warp, constants);
            __syncwarp();
            if (threadIdx.x % 32 == 0) arrive_at(ring.empty(turn));
            turn.advance();
        }
        if (add_up<consumers, 8>(sums, split, piece, Meeting{meeting, arrivals, ring.verdict(), int(threadIdx.x), 1}))
            write_sums(sums, bias, out, rows, n, piece.tile * band_rows + warp * tile_rows);
    }
}
