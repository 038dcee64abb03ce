// activation(left half) * right half of each row. A thread takes eight columns.
#include "elements.cuh"

constexpr bool gelu = GELU;  // tanh form; otherwise SiLU
constexpr float log2_e = 1.4426950408889634f;

DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp2_fast(-log2_e * x)); }
// 0.5 * (1 + tanh(u)) = sigmoid(2 u)
DEVICE float activate(float x) {
    if constexpr (gelu) return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
    return x * sigmoid(x);
}

extern "C" __global__ void gate(const u16* gate_up, int width, u16* out) {
    release_dependents();
    await_producers();
    const int n = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (n >= width) return;
    const u16* from = gate_up + 2 * (u64)blockIdx.y * width + n;
    float a[8], b[8];
    widen(a, *reinterpret_cast<const uint4*>(from));
    widen(b, *reinterpret_cast<const uint4*>(from + width));
#pragma unroll
    for (int k = 0; k < 8; k++) a[k] = activate(a[k]) * b[k];
    *reinterpret_cast<uint4*>(out + (u64)blockIdx.y * width + n) = narrow(a);
}
