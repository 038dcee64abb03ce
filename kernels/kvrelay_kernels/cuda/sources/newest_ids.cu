// Token ids of a step's rows: as the host gave them, or where it gave ~place, the newest one of the sequence there.
#include "primitives.cuh"

extern "C" __global__ void newest_ids(const int* given, const int* newest, int rows, int* ids) {
    release_dependents();
    const int row = blockIdx.x * blockDim.x + threadIdx.x, known = row < rows ? load_fresh(given + row) : 0;
    await_producers();
    if (row < rows) ids[row] = known < 0 ? newest[~known] : known;
}
