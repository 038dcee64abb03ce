// A matrix of codes -> 16-bit elements, row by row: each scale * code + bias, rounded once.
#include "coded_matrix.cuh"
#include "elements.cuh"

extern "C" __global__ void expand_matrix(const u8* codes, const Factors* factors, int columns, long long items, float unit, u16* out) {
    const long long n = 4 * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    if (n >= items) return;
    float x[4];
    const CodedMatrix matrix{codes, factors, (columns + unit_columns - 1) / unit_columns};
    matrix.values(x, int(n / columns), int(n % columns));
#pragma unroll
    for (float& y : x) y *= unit;
    *reinterpret_cast<uint2*>(out + n) = narrow(x);
}
