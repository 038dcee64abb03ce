// RMS norm of rows, of x or of x + y, which is then written too. One thread block a row, the row in registers.
//
// The residual stream (RESIDUAL) is float32, everything else 16 bit. A row's bits depend on that row alone.
// All of a row is asked for before any of it is used: latency is most of what a single row takes.
#include "elements.cuh"

constexpr int width = WIDTH, threads = THREADS;
constexpr bool residual = RESIDUAL;  // x is float32
constexpr bool add = ADD;            // y is added; only to a residual
constexpr int few_rows = 256;
constexpr int vectors = (width / 4 + threads - 1) / threads;
constexpr bool whole = width == 4 * vectors * threads;  // no thread has less than that

extern "C" __global__ void __launch_bounds__(threads, 1)
rms_norm(const void* x, const u16* y, const float* weight, float eps, float* sum, u16* out) {
    __shared__ float squares[threads / 32];
    release_dependents();
    const bool few = gridDim.x <= few_rows;  // of many, most find the weight in the first-level cache
    const u64 row = (u64)blockIdx.x * width;
    const auto from = [&](int i) { return 4 * (i * threads + threadIdx.x); };
    float4 w[vectors], wide[vectors];
    uint2 halves[vectors];
    const float* const wide_x = static_cast<const float*>(x);
    const u16* const half_x = static_cast<const u16*>(x);
#pragma unroll
    for (int i = 0; i < vectors; i++)
        if (few && (whole || from(i) < width)) w[i] = load_fresh(reinterpret_cast<const float4*>(weight + from(i)));
    await_producers();
#pragma unroll
    for (int i = 0; i < vectors; i++) {
        if (!whole && from(i) >= width) continue;
        const u64 at = row + from(i);
        if constexpr (add || !residual) halves[i] = load_fresh(reinterpret_cast<const uint2*>((add ? y : half_x) + at));
        if constexpr (residual) wide[i] = load_fresh(reinterpret_cast<const float4*>(wide_x + at));
        if (!few) w[i] = __ldg(reinterpret_cast<const float4*>(weight + from(i)));
    }
    float v[vectors][4];
#pragma unroll
    for (int i = 0; i < vectors; i++) {
        if constexpr (add || !residual) widen(v[i], halves[i]);
        if constexpr (add) v[i][0] += wide[i].x, v[i][1] += wide[i].y, v[i][2] += wide[i].z, v[i][3] += wide[i].w;
        else if constexpr (residual) v[i][0] = wide[i].x, v[i][1] = wide[i].y, v[i][2] = wide[i].z, v[i][3] = wide[i].w;
    }
    float square = 0;
#pragma unroll
    for (int i = 0; i < vectors; i++) {
        if (!whole && from(i) >= width) continue;
        if constexpr (add) *reinterpret_cast<float4*>(sum + row + from(i)) = {v[i][0], v[i][1], v[i][2], v[i][3]};
#pragma unroll
        for (int k = 0; k < 4; k++) square += v[i][k] * v[i][k];
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) square += __shfl_xor_sync(every_lane, square, step);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = square;
    __syncthreads();
    square = 0;
#pragma unroll
    for (int warp = 0; warp < threads / 32; warp++) square += squares[warp];
    const float factor = __frsqrt_rn(square / width + eps);
#pragma unroll
    for (int i = 0; i < vectors; i++) {
        if (!whole && from(i) >= width) continue;
        const float scaled[4] = {v[i][0] * factor * w[i].x, v[i][1] * factor * w[i].y, v[i][2] * factor * w[i].z,
                                 v[i][3] * factor * w[i].w};
        *reinterpret_cast<uint2*>(out + row + from(i)) = narrow(scaled);
    }
}
