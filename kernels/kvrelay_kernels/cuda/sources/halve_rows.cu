// Rows of x as halves, once for all thread blocks of `stream_codes`: as they lie in its ring, so that the copy engine
// brings whole stages.
#include "elements.cuh"
#include "row_halves.cuh"

constexpr int warps = WARPS;

// A warp takes four rows of 64 columns. x: [rows, k]; halves: [parts, part_units, columns, 64], swizzled, with zeros where
// x or a part has no more; behind them, of bfloat16, the powers of two that rows were multiplied with, [parts, part_units,
// columns] float32. Part p of x begins at unit p * units / parts.
extern "C" __global__ void __launch_bounds__(32 * warps)
halve_rows(const u16* x, int rows, int k, int columns, int parts, int part_units, u8* halves) {
    release_dependents();
    await_producers();
    const int lane = threadIdx.x % 32, piece = lane % 8, fours = columns / 4;
    const int at = blockIdx.x * warps + threadIdx.x / 32, place = at / fours, row = at % fours * 4 + lane / 8;
    if (place >= parts * part_units) return;  // the whole warp
    const int part = place / part_units, units = (k + unit_columns - 1) / unit_columns;
    const int unit = part * units / parts + place % part_units, column = unit * unit_columns + piece * 8;
    const bool there = row < rows && unit < (part + 1) * units / parts && column < k;
    u32 v[4] = {};
    if (there) {
        const uint4 found = load_near(reinterpret_cast<const uint4*>(x + u64(row) * k + column));
        v[0] = found.x, v[1] = found.y, v[2] = found.z, v[3] = found.w;
    }
    if constexpr (bfloat) {
        const float power = power_for(largest_exponent(v));
        round_to_halves(v, power);
        float* powers = reinterpret_cast<float*>(halves + u64(parts) * part_units * columns * 128);
        if (piece == 0) powers[place * columns + row] = power;
    }
    u8* to = halves + u64(place) * columns * 128;
#pragma unroll
    for (int q = 0; q < 4; q++) *reinterpret_cast<u32*>(to + pair_place(row, piece, q)) = v[q];
}
