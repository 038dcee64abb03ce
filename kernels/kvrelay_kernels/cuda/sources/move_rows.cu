// Rows by number: out[i] = x[rows[i]], or (SCATTER) out[rows[i]] = x[i]. One thread block a row of 16-byte units.
#include "primitives.cuh"

extern "C" __global__ void move_rows(const uint4* x, const int* rows, int units, uint4* out) {
    release_dependents();
    await_producers();
    const u64 here = (u64)blockIdx.x * units, there = (u64)rows[blockIdx.x] * units;
    for (int n = threadIdx.x; n < units; n += blockDim.x) {
        if constexpr (SCATTER) out[there + n] = x[here + n];
        else out[here + n] = x[there + n];
    }
}
