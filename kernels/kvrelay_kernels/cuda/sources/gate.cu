// activation(gate) * up of each row, in which 8 columns of the gate and their 8 of up lie by turns. A thread takes 8.
#include "activation.cuh"
#include "elements.cuh"

extern "C" __global__ void gate(const u16* gate_up, int width, u16* out) {
    release_dependents();
    await_producers();
    const int n = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (n >= width) return;
    const u64 at = (u64)blockIdx.y * width + n;
    const uint4* from = reinterpret_cast<const uint4*>(gate_up + 2 * at);
    float a[8], b[8];
    widen(a, from[0]);
    widen(b, from[1]);
#pragma unroll
    for (int k = 0; k < 8; k++) a[k] = activate(a[k]) * b[k];
    *reinterpret_cast<uint4*>(out + at) = narrow(a);
}
