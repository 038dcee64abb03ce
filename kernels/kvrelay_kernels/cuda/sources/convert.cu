// A weight as it was uploaded -> 16-bit elements: floats of any width, or affine codes (scale * code + bias).
#include "elements.cuh"

enum Source { float32 = 0, float16 = 1, bfloat16 = 2, codes = 3 };
constexpr int source = SOURCE;

// scales, biases: float32, one a `group` of items; only for codes. `items` is a multiple of 4.
extern "C" __global__ void convert(const void* from, const float* scales, const float* biases, int group, long long items, u16* out) {
    release_dependents();
    await_producers();
    const u64 n = 4 * ((u64)blockIdx.x * blockDim.x + threadIdx.x);
    if (n >= items) return;
    float x[4];
    if constexpr (source == float32) {
        const float4 a = *reinterpret_cast<const float4*>(static_cast<const float*>(from) + n);
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    } else if constexpr (source == codes) {
        const u32 word = *reinterpret_cast<const u32*>(static_cast<const u8*>(from) + n);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const u64 at = (n + k) / group;
            x[k] = __fadd_rn(__fmul_rn(float(word >> 8 * k & 0xff), scales[at]), biases[at]);
        }
    } else {
        const uint2 v = *reinterpret_cast<const uint2*>(static_cast<const u16*>(from) + n);
        const u32 pairs[2] = {v.x, v.y};
#pragma unroll
        for (int k = 0; k < 2; k++) {
            x[2 * k] = source == bfloat16 ? low_bfloat(pairs[k]) : low_half(pairs[k]);
            x[2 * k + 1] = source == bfloat16 ? high_bfloat(pairs[k]) : high_half(pairs[k]);
        }
    }
    *reinterpret_cast<uint2*>(out + n) = narrow(x);
}
