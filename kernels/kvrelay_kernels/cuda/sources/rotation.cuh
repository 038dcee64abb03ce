// The Walsh-Hadamard transform of quant/rotation.py; eight elements lie in a lane, a run in neighbouring lanes.
#pragma once
#include "primitives.cuh"

// Rotates runs of `run` elements: stages within a lane, then between the lanes that share the run. Every lane of the
// warp takes part; x changes where `mine`.
template <int run>
DEVICE void rotate(float (&x)[8], bool mine) {
    constexpr int exponent = run == 8 ? 3 : run == 16 ? 4 : run == 32 ? 5 : run == 64 ? 6 : run == 128 ? 7 : 8;
    constexpr float scale = (exponent % 2 ? 0.70710678118654752f : 1.0f) / (1 << exponent / 2);
    static_assert(run == 1 << exponent);
    float y[8];
#pragma unroll
    for (int k = 0; k < 8; k++) y[k] = x[k];
#pragma unroll
    for (int step = 1; step < 8; step *= 2)
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (!(k & step)) {
                const float a = y[k], b = y[k + step];
                y[k] = __fadd_rn(a, b), y[k + step] = __fsub_rn(a, b);
            }
#pragma unroll
    for (int step = 1; step < run / 8; step *= 2) {
        const float sign = threadIdx.x & step ? -1 : 1;
#pragma unroll
        for (int k = 0; k < 8; k++) y[k] = __fmaf_rn(y[k], sign, __shfl_xor_sync(every_lane, y[k], step));
    }
    if (!mine) return;
#pragma unroll
    for (int k = 0; k < 8; k++) x[k] = __fmul_rn(y[k], scale);
}
