// Token ids of a step's rows: as the host gave them, or where it gave ~place, the newest one of the sequence there.
#include "primitives.cuh"

extern "C" __global__ void newest_ids(const int* given, const int* newest, int rows, int* ids) {
    release_dependents();
    await_producers();
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row < rows) ids[row] = given[row] < 0 ? newest[~given[row]] : given[row];
}
