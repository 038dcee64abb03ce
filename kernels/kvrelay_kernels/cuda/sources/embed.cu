// Rows of a table, scaled, as float32: the beginning of the residual stream. One thread block a row.
#include "elements.cuh"

extern "C" __global__ void embed(const u16* table, const int* ids, float scale, int width, float* out) {
    const u16* from = table + (u64)ids[blockIdx.x] * width;
    float* to = out + (u64)blockIdx.x * width;
    for (int n = 4 * threadIdx.x; n < width; n += 4 * blockDim.x) {
        float x[4];
        widen(x, __ldg(reinterpret_cast<const uint2*>(from + n)));
        *reinterpret_cast<float4*>(to + n) = {x[0] * scale, x[1] * scale, x[2] * scale, x[3] * scale};
    }
}
