// RMS norm of rows, of x or of x + y, which is then written too. One thread block a row, the row in registers.
//
// The residual stream (RESIDUAL) is float32, everything else 16 bit. A row's bits depend on that row alone.
#include "elements.cuh"

constexpr int width = WIDTH, threads = THREADS;
constexpr bool residual = RESIDUAL;  // x is float32
constexpr bool add = ADD;            // y is added; only to a residual
constexpr int few_rows = 256;
constexpr int vectors = (width / 4 + threads - 1) / threads;

extern "C" __global__ void __launch_bounds__(threads)
rms_norm(const void* x, const u16* y, const float* weight, float eps, float* sum, u16* out) {
    __shared__ float squares[threads / 32];
    release_dependents();
    // Of many rows the first ones bring the weight.
    if (gridDim.x <= few_rows && 32 * threadIdx.x < width) prefetch_line(weight + 32 * threadIdx.x);
    await_producers();
    const u64 row = (u64)blockIdx.x * width;
    float v[vectors][4];
    float4 w[vectors];
#pragma unroll
    for (int i = 0; i < vectors; i++) {
        const int n = 4 * (i * threads + threadIdx.x);
        if (n >= width) continue;
        w[i] = __ldg(reinterpret_cast<const float4*>(weight + n));
        if constexpr (residual) {
            const float4 a = *reinterpret_cast<const float4*>(static_cast<const float*>(x) + row + n);
            v[i][0] = a.x, v[i][1] = a.y, v[i][2] = a.z, v[i][3] = a.w;
        } else {
            widen(v[i], *reinterpret_cast<const uint2*>(static_cast<const u16*>(x) + row + n));
        }
        if constexpr (add) {
            float b[4];
            widen(b, *reinterpret_cast<const uint2*>(y + row + n));
#pragma unroll
            for (int k = 0; k < 4; k++) v[i][k] += b[k];
        }
    }
    float square = 0;
#pragma unroll
    for (int i = 0; i < vectors; i++) {
        const int n = 4 * (i * threads + threadIdx.x);
        if (n >= width) continue;
        if constexpr (add) *reinterpret_cast<float4*>(sum + row + n) = {v[i][0], v[i][1], v[i][2], v[i][3]};
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
        const int n = 4 * (i * threads + threadIdx.x);
        if (n >= width) continue;
        const float scaled[4] = {v[i][0] * factor * w[i].x, v[i][1] * factor * w[i].y, v[i][2] * factor * w[i].z,
                                 v[i][3] * factor * w[i].w};
        *reinterpret_cast<uint2*>(out + row + n) = narrow(scaled);
    }
}
